"""The page of a comparison: its rows, what they say in words, and HTML that needs no network.

Knows nothing of how anything was measured, or decoded; everything on the page is in compare.json.
"""
