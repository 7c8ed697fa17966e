"""What a text has to be, token by token: JSON of a schema, what an expression matches, or a grammar.

Knows nothing of models. Public are the functions of `constraint`; `vocabulary` and `matcher` stand on llguidance.
"""
