"""Weights in and out: targets, heads, export, inspection.

Knows nothing of training.
"""
