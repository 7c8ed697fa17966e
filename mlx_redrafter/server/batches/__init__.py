"""Requests that are answered together.

Knows nothing of HTTP.
"""
