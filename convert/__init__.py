"""Hugging Face weights to MLX weights."""
