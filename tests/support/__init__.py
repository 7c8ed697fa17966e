"""Small random models that tests share, and where larger ones lie."""

from __future__ import annotations

import pathlib

import mlx_redrafter  # isort: skip # noqa: F401 (before mlx: it puts OpenBLAS in front of MLX's BLAS)

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from mlx_redrafter.decoding.loop import autoregressive
from mlx_redrafter.decoding.planner import Planner, StepRead
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.beam_search import Beam
from mlx_redrafter.drafting.lookup import LONGEST, SHORTEST
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.drafting.shape import Drafted, DraftShape, Plan
from mlx_redrafter.target.model import Target

REPEATING = [3, 14, 15, 92, 65, 35, 89, 79] * 4 + [3, 14, 15]
RANDOM = np.random.default_rng(1).permutation(97)[:40].tolist()
DATA = pathlib.Path(__file__).parents[1] / "data"
SHARED = pathlib.Path(__file__).parents[3] / "shared"


def make_model(seed: int = 0, vocab: int = 97, hidden: int = 32, **changes) -> Model:
    mx.random.seed(seed)
    args = ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **changes,
    )
    model = Model(args)
    # Larger than the usual initial weights, so that choices depend on what was read.
    for module in (layer.self_attn for layer in model.layers):
        module.q_proj.weight, module.k_proj.weight = 3 * module.q_proj.weight, 3 * module.k_proj.weight
    model.lm_head.weight = 4 * model.lm_head.weight
    mx.eval(model.parameters())
    return model


def filled(model, tokens: list[int]) -> list:
    """mlx-lm's caches of a model that has read these tokens."""
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def make_drafter(vocab: int = 97, hidden: int = 32, seed: int = 0, **changes) -> RecurrentDrafter:
    """A drafter of random weights, large enough that every token it reads shows in what it says."""
    mx.random.seed(seed)
    shape = {"vocab_size": vocab, "hidden_size": hidden, "exit_dim": hidden, "num_draft_layers": 2, "rnn": True}
    drafter = RecurrentDrafter(DrafterConfig(**(shape | changes)))
    drafter.lm_head.weight = 6 * drafter.lm_head.weight
    if drafter.config.rnn:
        drafter.rnn_w.weight = 6 * drafter.rnn_w.weight
    mx.eval(drafter.parameters())
    return drafter


def final_beams(beam: Beam) -> mx.array:
    """The final beams' tokens, (B, W, L - 1), most probable beam first (the root left out)."""
    entry = mx.broadcast_to(mx.arange(beam.tokens.shape[2], dtype=mx.int32), beam.tokens[:, 0].shape)
    columns: list[mx.array] = []
    for step in reversed(range(beam.tokens.shape[1])):
        columns.insert(0, mx.take_along_axis(beam.tokens[:, step], entry, axis=1))
        entry = mx.take_along_axis(beam.origins[:, step], entry, axis=1)
    return mx.stack(columns, axis=-1)


def always(shape: DraftShape) -> Planner:
    """Drafts one shape in every step."""
    return Planner(Drafted(shape))


class Script(Planner):
    """Plans that take turns, one step each, and the steps as they were read."""

    def __init__(self, plans: list[Plan]):
        super().__init__(plans[0])
        self.plans, self.steps = plans, list[StepRead]()

    def plan(self) -> Plan:
        return self.plans[len(self.steps) % len(self.plans)]

    def learn(self, step: StepRead) -> None:
        self.steps.append(step)


def plainly(model, prompt: list[int], count: int, choose=greedy) -> list[int]:
    """What our loop writes without drafts."""
    cache, options = make_prompt_cache(model), DecodingOptions(choose, count)
    return [step.tokens[0] for step in autoregressive(Target(model), mx.array([prompt]), cache, options)]


def looked_up_by_hand(text: list[int], count: int) -> list[int]:
    """What followed the most recent of the longest matches, by looking at every place."""
    best = (0, 0)
    for end in range(len(text) - 1):
        run = 0
        while run < min(LONGEST, end + 1) and text[end - run] == text[-1 - run]:
            run += 1
        best = max(best, (run, end))
    run, end = best
    if run < SHORTEST:
        return []
    text = list(text)
    for i in range(count):
        text.append(text[end + 1 + i])
    return text[-count:]
