"""A step in front of which a prompt has been read."""

import mlx.core as mx

from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep, prefill


def first_step(verifier, prompts, proposer):
    """The first one behind prompts of one length."""
    cache, tokens, options = verifier.make_cache(), mx.array(prompts), DecodingOptions()
    hidden, logits = prefill(verifier.target, tokens, cache.layers, options, proposer.context_layers)
    cache.begin_trees(len(prompts))
    root = greedy(logits[:, None], None)[:, 0]
    proposer.begin(tokens, root, hidden)
    return SpeculativeStep(verifier, proposer, options, cache, hidden, root)
