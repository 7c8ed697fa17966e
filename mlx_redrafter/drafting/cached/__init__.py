"""Drafters that keep keys and values of the text, as models do: an ordinary small model.

Knows nothing of files, nor of verification by the target.
"""
