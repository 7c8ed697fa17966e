"""A module for each kind of `mlx-redrafter bench`, with HELP, add_arguments(parser), and run(args), which reports.

Knows nothing of one another, or of how a step works.
"""
