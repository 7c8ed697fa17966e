"""Drafters that keep keys and values of the text, as models do: a small model, an EAGLE-3 head, a layer of the model.

Knows nothing of verification by the target.
"""
