"""What a model that is split over several machines gains from drafts: computed, and tried over slow links.

Knows nothing of how a model is split.
"""
