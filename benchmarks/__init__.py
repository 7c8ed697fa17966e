"""Speed, measured side by side on the device at hand: `mlx-redrafter bench KIND`.

Knows nothing of how a step works; it times what others built.
"""
