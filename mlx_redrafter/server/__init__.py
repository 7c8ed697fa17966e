"""mlx_lm's server with drafts in it: loading, one generation thread, HTTP, caches that outlive the process.

Knows nothing of commands; what mlx_lm's server does well is inherited from it.
"""
