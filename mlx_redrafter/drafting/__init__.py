"""Everything that proposes a tree of candidates: shapes, heads, beam search, lookup.

Knows nothing of loops, nor of what a step costs.
"""
