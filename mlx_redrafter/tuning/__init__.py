"""Which shape pays on this device, and when: measured costs, what drafts bring, what steps take, controllers.

Knows nothing of prompts and of how a text is decoded.
"""
