"""The KV cache of all layers: a tree's rows behind the committed ones, of which one path stays.

Knows nothing of drafters, nor of how tokens are chosen.
"""
