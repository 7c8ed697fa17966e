"""Other companies' APIs as chat completions: what comes in, and what goes out, whole or as events.

Knows nothing of models, and of HTTP only how events are written.
"""
