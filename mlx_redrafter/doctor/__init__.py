"""`mlx-redrafter doctor`: the program checks itself on the device it is used on.

Knows nothing of benchmarks or of training.
"""
