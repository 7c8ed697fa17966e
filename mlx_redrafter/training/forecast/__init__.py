"""What a training is expected to come to, from its first tenth.

Knows nothing of how updates are made.
"""
