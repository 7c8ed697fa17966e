"""Training a drafter for a target.

Knows nothing of conversion or of benchmarks.
"""
