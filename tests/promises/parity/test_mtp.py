"""A model's own multi-token-prediction layer on MLX against PyTorch, from published names to whole texts."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.check import PROMPT
from mlx_redrafter.convert.drafter import convert_drafter

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.cached.memory import Memory
from mlx_redrafter.drafting.cached.proposer import CachedProposer
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.shape import Drafted, DraftShape
from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import fit_drafter
from mlx_redrafter.tuning.session import session_for

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

from torch_reference.mtp import FAMILIES, Mtp  # noqa: E402
from torch_reference.pairs import to_numpy, worst  # noqa: E402

SIZE, VOCAB = 64, 99

pytestmark = pytest.mark.usefixtures("without_a_compiler")


def published(folder, family, model, **form):
    """The reference's layer for a small model, and a checkpoint that has it."""
    config = small_models.config(family)
    text = model.language_model if family.startswith("qwen3_5") else model
    tables = [torch.from_numpy(to_numpy(w)) for w in (text.model.embed_tokens.weight, text.lm_head.weight)]
    torch.manual_seed(3)
    layer = Mtp(family, config.get("text_config", config), *tables).eval()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: mx.array(to_numpy(value)) for name, value in layer.checkpoint(**form).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), state)
    return layer


def converted(folder, family, **form):
    """A small model, the reference's layer, and ours of the same checkpoint, ready to draft."""
    model = small_models.build(family)
    theirs = published(folder / "hf", family, model, **form)
    convert_drafter(str(folder / "hf"), str(folder / "mlx"))
    ours = open_drafter(folder / "mlx")
    check_pair(Target.of(model), ours)
    return model, theirs, ours


@pytest.mark.parametrize(("family", "stacked"), [*((f, False) for f in FAMILIES), ("qwen3_5_moe", True)])
def test_logits_and_beams(family, stacked, tmp_path):
    """If this fails, a family's layer is read into the wrong places, or computes something else."""
    _, theirs, ours = converted(tmp_path, family, stacked=stacked)
    contexts, tokens = torch.randn(15, SIZE), torch.randint(0, VOCAB, (15,)).tolist()
    mine, ids = mx.array(to_numpy(contexts))[None], mx.array([tokens], mx.int32)
    proposer = CachedProposer(ours)
    proposer.memory = memory = Memory(ours)
    memory.begin(ids[:, :6], mine[:, :6])
    assert worst(memory.last()[1][0], theirs.logits(contexts[:6], tokens[:6])) < 1e-4
    # A step's rows, of which the last were rejected, and others that are known by the time they are read.
    for start, size, count in ((6, 5, 3), (9, 1, 1), (10, 5, 4), (14, 1, 1)):
        counted = None if size == 1 else mx.array([count])
        memory.extend(ids[:, start : start + size], mine[:, start : start + size], counted)
        if start != 9:
            end = start + count
            assert worst(memory.last()[1][0], theirs.logits(contexts[:end], tokens[:end])) < 1e-4
    memory.extend(ids[:, :1], mine[:, :1], None)
    text, rows = [*tokens, tokens[0]], torch.cat([contexts, contexts[:1]])
    tree = proposer.propose(mine[:, -1], mx.array([text[-1]]), Drafted(DraftShape(3, 5, 12)))
    paths = [()]
    for token, parent in zip(tree.tokens[0].tolist()[1:], tree.parents[0].tolist()[1:]):
        paths.append((*paths[parent], token))
    assert set(paths[1:]) == {path for beam in theirs.beams(rows, text, 3, 5) for path in beam}


def test_a_quantised_target(tokenizer, tmp_path):
    """If this fails, a target of packed weights cannot share its embedding or its output layer."""
    model, *_ = converted(tmp_path, "mimo")
    nn.quantize(model, 32, 4)
    again = open_drafter(tmp_path / "mlx")
    fit_drafter(again, model, tokenizer, "it")
    texts = [
        [r.token for r in stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=12, shape=shape)]
        for drafter, shape in ((None, "auto"), (again, DraftShape(2, 4, 5)))
    ]
    assert texts[0] == texts[1]


def test_a_conversation_reads_on(tokenizer, tmp_path, scores_seen):
    """If this fails, a layer sees nothing of earlier turns, or rows that were taken back."""
    model, theirs, ours = converted(tmp_path, "mimo")
    cache, text = make_prompt_cache(model), []
    session_for(verifier_of(model), ours)  # measures, with a memory of its own
    for turn in (PROMPT[:5], PROMPT[5:9], PROMPT[9:]):
        scores_seen.clear()
        options = {"max_tokens": 8, "shape": DraftShape(3, 4, 7), "prompt_cache": cache}
        known = [*text, *turn]
        stream = stream_generate(model, tokenizer, turn, ours, cached_tokens=text, **options)
        text = [*known, *[response.token for response in stream][:8]]
        hidden, _ = Target.of(model).forward(mx.array([text]), [None] * 4)
        contexts, rows = torch.from_numpy(to_numpy(hidden[0])), len(known)
        assert worst(scores_seen[0][0], theirs.logits(contexts[:rows], text[1 : rows + 1])) < 1e-4


@pytest.mark.parametrize("family", ["mimo", "glm4_moe", "qwen3_next"])
def test_texts(family, tokenizer, tmp_path):
    """If this fails, a layer changes the text, or is asked about another one than the target's."""
    model, theirs, ours = converted(tmp_path, family)

    def written(drafter, shape="auto", **options):
        stream = stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=24, shape=shape, **options)
        return [response.token for response in stream][:24]

    plain = written(None)
    assert written(ours, DraftShape(3, 4, 7), lookup="on") == plain
    if family == "glm4_moe":  # whose routers are kept in full
        ours.set_dtype(mx.bfloat16)
        kinds = {name: value.dtype for name, value in tensors(ours).items()}
        assert {name for name, kind in kinds.items() if kind == mx.float32} == {
            "body.layers.0.mlp.gate.e_score_correction_bias"
        }
        ours.set_dtype(mx.float32)
    if family == "qwen3_next":
        again = open_drafter(tmp_path / "mlx")
        again.quantize(32, 8)
        whole = {name for name, m in again.named_modules() if hasattr(m, "to_quantized")}
        assert whole == {"body.layers.0.mlp.gate", "body.layers.0.mlp.shared_expert_gate"}
    sampled = position_keyed(0.8, seed=3)
    assert written(ours, DraftShape(3, 4, 7), chooser=sampled) == written(None, chooser=sampled)
    asked, propose = [], CachedProposer.propose

    def spied(proposer, *args, **kwargs):
        tree = propose(proposer, *args, **kwargs)
        asked.append(tree.tokens[0].tolist())
        return tree

    proposer, found, lengths, verifier = CachedProposer(ours), list(PROMPT), [], verifier_of(model)
    proposer.propose = spied.__get__(proposer)
    options, plan = DecodingOptions(max_tokens=12, prefill_step_size=3), Planner(Drafted(DraftShape(1, 4, 3)))
    for produced in speculative(verifier, proposer, mx.array([PROMPT]), verifier.make_cache(), options, plan):
        found += produced.tokens
        lengths.append(len(found))
    assert found[len(PROMPT) :] == plain[: len(found) - len(PROMPT)]
    cache = model.make_cache() if hasattr(model, "make_cache") else [None] * 4
    hidden = torch.from_numpy(to_numpy(Target.of(model).forward(mx.array([found]), cache)[0][0]))
    for tokens, length in list(zip(asked, lengths))[::4]:
        [*_, [best]] = theirs.beams(hidden[: length - 1], found[1:length], 1, 4)
        assert tokens == [found[length - 1], *best]
