"""What we ask of an mlx-lm model: hidden states, verification of a tree, rolling back.

Knows nothing of drafters.
"""
