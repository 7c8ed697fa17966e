"""The parts of `bench ablation`: recipes, readings that they share, and acceptance measured on given texts.

Knows nothing of the command's flags.
"""
