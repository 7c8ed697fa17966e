"""Many prompts in, many texts out, decoded together.

Knows nothing of how a step is decoded.
"""
