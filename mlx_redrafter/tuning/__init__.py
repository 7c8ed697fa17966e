"""Which shape pays on this device, and when: measured costs, what drafts bring, what steps take, controllers.

Knows nothing of text.
"""
