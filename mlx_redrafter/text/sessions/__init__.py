"""What was asked and answered, kept on this machine for a later training where the user allows it.

Knows nothing of how text is made.
"""
