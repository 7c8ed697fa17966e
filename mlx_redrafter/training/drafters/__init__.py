"""What the trainer needs to know of each kind of drafter.

Knows nothing of where text comes from.
"""
