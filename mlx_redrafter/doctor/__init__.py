"""`mlx-redrafter doctor`: the program checks itself on the device it is used on."""
