"""The text that drafters learn from: read from files, written by the target, rendered from messages.

Knows nothing of drafters.
"""
