"""What a user types: one module per command.

Knows models only through the packages below it; no program imports it.
"""
