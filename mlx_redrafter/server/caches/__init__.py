"""KV caches of earlier prompts, in memory and on disk.

Knows nothing of requests.
"""
