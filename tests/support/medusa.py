"""Medusa heads of random weights, and such that know a text."""

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.proposers import MedusaProposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def make_heads(vocab=97, hidden=32, heads=4, layers=1, seed=0, **changes) -> MedusaHeads:
    """Heads of random weights, large enough that block and bias show in what they say."""
    mx.random.seed(seed)
    made = MedusaHeads(MedusaConfig(vocab, hidden, heads, layers, **changes))
    for head in made.heads:
        for block in head.blocks:
            block.linear.bias = mx.random.normal(block.linear.bias.shape)
    mx.eval(made.parameters())
    return made


def knowing(heads: MedusaHeads, model, text: list[int]) -> MedusaHeads:
    """The same heads with output layers that are right for most places of a text (least squares)."""
    hidden, _ = Target(model).forward(mx.array([text]), [None] * len(model.layers))
    features = np.array(hidden[0], np.float64)
    for k, head in enumerate(heads.heads):
        wanted = np.array(text[k + 2 :])
        z = mx.array(features[: len(wanted)].astype(np.float32))
        for block in head.blocks:
            z = block(z)
        inputs = np.array(z, np.float64)
        labels = np.eye(heads.config.vocab_size)[wanted]
        gram = inputs.T @ inputs + 1e-3 * np.eye(inputs.shape[1])
        head.lm_head.weight = mx.array(np.linalg.solve(gram, inputs.T @ labels).T.astype(np.float32))
    return heads


def steps_of(model, heads, shape, count, choose=greedy, verifier=None, proposer=None):
    verifier = verifier or verifier_of(model)
    proposer, planner = proposer or MedusaProposer(heads), Planner(Drafted(shape, isinstance(proposer, LookupProposer)))
    cache, options = verifier.make_cache(), DecodingOptions(choose, count)
    return [p.tokens for p in speculative(verifier, proposer, mx.array([PROMPT]), cache, options, planner)]
