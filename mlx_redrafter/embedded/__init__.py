"""The small pair for tests and as fallback, and where its text is from.

Knows nothing of how it is loaded.
"""
