"""EAGLE-3 heads on MLX against the PyTorch reference, from published checkpoints to whole texts."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import dataclasses
import json

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.check import PROMPT
from mlx_redrafter.convert.drafter import convert_drafter

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.cached.memory import Memory
from mlx_redrafter.drafting.cached.proposer import CachedProposer
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.tuning.session import session_for

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

from torch_reference.eagle import Eagle  # noqa: E402
from torch_reference.pairs import to_numpy, worst  # noqa: E402

SIZE, VOCAB, DRAFTED = 64, 99, 40
LAYER = {
    "hidden_size": SIZE,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "model_type": "llama",
}
AUX = "eagle_aux_hidden_state_layer_ids"
# As SafeAILab, SpecForge and speculators publish them: config, tensors' names, file. All read layers 1, 3 and 4.
NAMINGS = {
    "SafeAILab": (LAYER | {"draft_vocab_size": DRAFTED, AUX: [1, 3, 4]}, str, "pytorch_model.bin"),
    "SpecForge": (
        LAYER
        | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFTED, "eagle_config": {AUX: [0, 2, 3]}},
        str,
        "model.safetensors",
    ),
    "speculators": (
        {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": DRAFTED,
            "norm_before_residual": True,
            "transformer_layer_config": LAYER,
            AUX: [1, 3, 4],
        },
        lambda name: name.replace("midlayer.", "layers.0."),
        "model.safetensors",
    ),
}


pytestmark = pytest.mark.usefixtures("without_a_compiler")


def published(folder, naming="SafeAILab", own_embedding=True, **changes):
    """The reference's head, and its checkpoint."""
    fields, rename, file = NAMINGS[naming]
    torch.manual_seed(3)
    before = bool(fields.get("norm_before_residual"))
    head = Eagle(SIZE, SIZE, VOCAB, DRAFTED, norm_before_residual=before).eval()
    state = {rename(name): value for name, value in head.state_dict().items()}
    if not own_embedding:
        del state["embed_tokens.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | changes))
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        mx.save_safetensors(str(folder / file), {name: mx.array(to_numpy(value)) for name, value in state.items()})
    return head


def converted(folder, target, **options):
    """The reference's head and ours, of one checkpoint, ready to draft for a target."""
    theirs = published(folder / "hf", **options)
    convert_drafter(str(folder / "hf"), str(folder / "mlx"))
    ours = open_drafter(folder / "mlx")
    check_pair(target, ours)
    if not ours.config.own_embedding:
        theirs.embed_tokens.weight.data = torch.from_numpy(to_numpy(target.model.model.embed_tokens.weight))
    return theirs, ours


@pytest.fixture(scope="module")
def llama():
    return small_models.build("llama")


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("own_embedding", [True, False])
def test_logits_and_beams(naming, own_embedding, llama, tmp_path):
    """If this fails, published heads of one kind are read into the wrong places, or compute something else."""
    theirs, ours = converted(tmp_path, Target.of(llama), naming=naming, own_embedding=own_embedding)
    assert tuple(ours.context_layers) == (1, 3, 4)
    contexts, tokens = torch.randn(15, 3 * SIZE), torch.randint(0, VOCAB, (15,)).tolist()
    mine, ids = mx.array(to_numpy(contexts))[None], mx.array([tokens], mx.int32)
    proposer = CachedProposer(ours)
    proposer.memory = memory = Memory(ours)
    memory.begin(ids[:, :6], mine[:, :6])
    _, scores = memory.last()
    assert worst(scores[0], theirs.logits(contexts[:6], tokens[:6])) < 1e-4
    # A step's rows, of which the last were rejected, and others that are known by the time they are read.
    for start, size, count in ((6, 5, 3), (9, 1, 1), (10, 5, 4), (14, 1, 1)):
        counted = None if size == 1 else mx.array([count])
        memory.extend(ids[:, start : start + size], mine[:, start : start + size], counted)
        if start != 9:
            _, scores = memory.last()
            end = start + count
            assert worst(scores[0], theirs.logits(contexts[:end], tokens[:end])) < 1e-4
    memory.extend(ids[:, :1], mine[:, :1], None)
    text, rows = [*tokens, tokens[0]], torch.cat([contexts, contexts[:1]])
    root = mx.array([text[-1]])
    tree = proposer.propose(mine[:, -1], root, Drafted(DraftShape(3, 5, 12)))
    assert paths_of(tree) == {path for beam in theirs.beams(rows, text, 3, 5) for path in beam}


def paths_of(tree: CandidateTree) -> set[tuple[int, ...]]:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths = [()]
    for row in range(1, len(tokens)):
        paths.append((*paths[parents[row]], tokens[row]))
    return set(paths[1:])


class Knowing(CachedProposer):
    """Asks the head, and verifies what the text goes on with in its place, so that all of it is accepted."""

    def __init__(self, head, text):
        super().__init__(head)
        self.known, self.asked = text, []

    def propose(self, context, root, plan, chain_only=False):
        tree = super().propose(context, root, plan, chain_only)
        self.asked.append(tree.tokens[0].tolist())
        rows = self.known[self.place : self.place + 4]
        self.place += len(rows) if chain_only else 3
        if chain_only:
            return CandidateTree.chain(mx.array([rows], mx.int32))
        # Each right token has a wrong one before it: the accepted path is not the first rows.
        wrong = [(token + 1) % VOCAB for token in rows]
        return CandidateTree.static(mx.array([[rows[0], wrong[1], rows[1], wrong[2], rows[2]]]), (0, 0, 0, 2, 2))

    def begin(self, text, root, contexts):
        super().begin(text, root, contexts)
        self.place = text.shape[1]


@pytest.mark.parametrize("chunk", [2048, 3])
@pytest.mark.parametrize("module", ["llama", "qwen3_next"])
def test_decoding_reads_the_text(module, chunk, tmp_path):
    """If this fails, a head is asked about another text than the target's: it drafts, but badly."""
    model = small_models.build(module)
    target, verifier = Target.of(model), verifier_of(model)
    theirs, ours = converted(tmp_path, target)
    text = list(PROMPT)
    options = DecodingOptions(max_tokens=48, prefill_step_size=chunk)
    nobody, cache = Proposer(), verifier.make_cache()
    for produced in speculative(verifier, nobody, mx.array([PROMPT]), cache, options, Planner(PLAIN)):
        text += produced.tokens
    proposer, found, options = Knowing(ours, text), list(PROMPT), dataclasses.replace(options, max_tokens=33)
    plan, lengths = Planner(Drafted(DraftShape(1, 4, 3))), []
    for produced in speculative(verifier, proposer, mx.array([PROMPT]), verifier.make_cache(), options, plan):
        found += produced.tokens
        lengths.append(len(found))
    assert found[: len(text)] == text[: len(found)] and len(lengths) <= 13
    hidden, _ = target.forward(mx.array([text]), model.make_cache() if module == "qwen3_next" else [None] * 4,
        context_layers=ours.context_layers)  # fmt: skip
    contexts = torch.from_numpy(to_numpy(hidden[0]))
    for asked, length in list(zip(proposer.asked, lengths))[::3]:
        [*_, [best]] = theirs.beams(contexts[: length - 1], text[1:length], 1, 4)
        assert asked == [text[length - 1], *best]


@pytest.mark.parametrize("count", [7, 8, 9])
def test_a_conversation_reads_on(count, llama, tokenizer, tmp_path, scores_seen):
    """If this fails, a head sees nothing of earlier turns, or rows that were taken back."""
    target, cache, text = Target.of(llama), make_prompt_cache(llama), []
    theirs, ours = converted(tmp_path, target)
    session_for(verifier_of(llama), ours)  # measures, with a memory of its own
    for turn in (PROMPT[:5], PROMPT[5:9], PROMPT[9:]):
        scores_seen.clear()
        options = {"max_tokens": count, "shape": DraftShape(3, 4, 7), "lookup": "on", "prompt_cache": cache}
        responses = stream_generate(llama, tokenizer, turn, ours, cached_tokens=text, **options)
        known = [*text, *turn]
        text = [*known, *[response.token for response in responses][:count]]
        hidden, _ = target.forward(mx.array([text]), [None] * 4, context_layers=ours.context_layers)
        contexts = torch.from_numpy(to_numpy(hidden[0]))
        rows = len(known)  # the first step drafts behind the token after the prompt
        assert worst(scores_seen[0][0], theirs.logits(contexts[:rows], text[1 : rows + 1])) < 1e-4


@pytest.mark.parametrize("module", ["llama", "qwen3", "qwen3_moe", "qwen3_next"])
def test_texts(module, tokenizer, tmp_path):
    """If this fails, a head changes the text."""
    model = small_models.build(module)
    _, ours = converted(tmp_path, Target.of(model), own_embedding=False)

    def written(drafter, shape="auto", **options):
        stream = stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=40, shape=shape, **options)
        return [response.token for response in stream][:40]

    plain = written(None)
    for shape, lookup in ((DraftShape(3, 4, 7), "on"), (DraftShape(1, 4, 3), "off")):
        assert written(ours, shape, lookup=lookup, chooser=greedy) == plain
    sampled = position_keyed(0.8, seed=3)
    assert written(ours, DraftShape(3, 4, 7), chooser=sampled) == written(None, chooser=sampled)
