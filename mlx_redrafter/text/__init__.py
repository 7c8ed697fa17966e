"""Prompt in, text out: loading, prompts, generation, responses, conversations.

Knows nothing of commands.
"""
