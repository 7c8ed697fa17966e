"""The pairs that come with the package: a small one for tests and as fallback, and the assistant's drafter.

Knows nothing of how they are loaded, or of what they write.
"""
