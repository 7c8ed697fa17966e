"""Each kind of drafter that can be trained: how it begins, what it scores, how it is kept.

Knows nothing of where text comes from.
"""
