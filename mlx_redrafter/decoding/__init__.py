"""One step, the loops around it, and how the target chooses.

Knows nothing of text, of files, nor of what a step costs.
"""
