"""Drafters that keep keys and values of the text, as models do: a small model, an EAGLE-3 head, a layer of the target's.

Knows nothing of verification by the target.
"""
