"""HTTP in front of the generation: who may ask what, what a body has to be, and what an answer says.

Knows nothing of models.
"""
