"""What each of mlx-lm's model modules can be used for, tried on small random instances.

`python -m mlx_redrafter.benchmarks.architectures` makes the table. Knows nothing of speed.
"""
