"""Drafters that keep keys and values of the text, as models do: an ordinary small model, an EAGLE-3 head.

Knows nothing of files, nor of verification by the target.
"""
