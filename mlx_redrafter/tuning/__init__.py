"""Which shape pays on this device, and when: measured costs, running averages, controllers.

Knows nothing of text.
"""
