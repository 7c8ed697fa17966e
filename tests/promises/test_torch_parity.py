"""The MLX path against the PyTorch reference in `torch_reference`: same weights, same numbers, same text."""

from __future__ import annotations

import ctypes
import json
import pathlib

import mlx_redrafter  # before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.step import SpeculativeStep, prefill
from mlx_redrafter.drafting.beam_search import Beam, beam_search, candidate_tree
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.redrafter import (
    DrafterConfig,
    RecurrentDrafter,
    build_drafter,
    load_drafter,
    quantize_drafter,
)
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.acceptance import accept
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Verifier

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from torch_reference.pairs import (  # noqa: E402
    memorise,
    mlx_target,
    renamed,
    to_mlx,
    to_numpy,
    to_torch,
    torch_drafter,
    torch_target,
    worst,
)
from torch_reference.tree import from_paths  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

STORIES = pathlib.Path(__file__).parents[3] / "shared" / "models" / "stories260K"
EMBEDDED = pathlib.Path(mlx_redrafter.__file__).parent / "embedded"
POLICIES = ("best-first", "beams")

VOCAB, HIDDEN = 150, 48
TARGETS = {
    "grouped-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"num_key_value_heads": 1, "tie_word_embeddings": False},
}
# What mlx-lm calls rope_theta and rope_scaling, transformers writes as rope_parameters.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DRAFTERS = {  # exit_dim, num_draft_layers, rnn
    "rnn": (40, 2, True),
    "rnn-wide": (2 * HIDDEN, 1, True),
    "sum": (72, 1, False),
    "sum-wide": (2 * HIDDEN, 3, False),
    "no-blocks": (40, 0, True),
}
SHAPES = [  # W, L, N
    (1, 2, 1),
    (1, 5, 4),
    (2, 4, 3),
    (3, 4, 9),
    (4, 5, 8),
    (6, 4, 7),
    (8, 3, 16),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that share these small products mostly wait for one another: minutes, beside a busy core.

    An OpenBLAS in front of MLX's BLAS multiplies some of PyTorch's matrices too, on threads of its own.
    """
    process = ctypes.CDLL(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blas_threads = process.openblas_get_num_threads() if hasattr(process, "openblas_get_num_threads") else None
    if blas_threads:
        process.openblas_set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if blas_threads:
        process.openblas_set_num_threads(blas_threads)


@pytest.fixture(scope="module", params=TARGETS)
def targets(request, tmp_path_factory) -> tuple[LlamaForCausalLM, Verifier]:
    """A random Llama, in PyTorch and, through its files, in mlx-lm."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    is_llama3 = request.param == "llama3-rope"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        # Large enough that attention is far from uniform: a wrong position or mask has to show.
        initializer_range=0.25,
        rope_parameters={"rope_theta": 500.0, **LLAMA3} if is_llama3 else {"rope_theta": 1e4, "rope_type": "default"},
        **TARGETS[request.param],
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    in_mlx_words = {"rope_theta": 500.0, "rope_scaling": LLAMA3} if is_llama3 else None
    return torch_target(folder), mlx_target(folder, in_mlx_words)


@pytest.fixture(scope="module", params=DRAFTERS)
def drafters(request) -> tuple[reference.Drafter, RecurrentDrafter]:
    drafter = torch_drafter(VOCAB, HIDDEN, *DRAFTERS[request.param])
    return drafter, to_mlx(drafter)


@pytest.fixture(scope="module")
def embedding() -> tuple[torch.nn.Embedding, nn.Embedding]:
    torch.manual_seed(2)
    table = torch.nn.Embedding(VOCAB, HIDDEN).to(reference.DEVICE)
    ours = nn.Embedding(VOCAB, HIDDEN)
    ours.weight = mx.array(to_numpy(table.weight))
    return table, ours


def random_contexts(batch: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(3)
    contexts = torch.randn(batch, HIDDEN, generator=generator).to(reference.DEVICE)
    return contexts, torch.randint(VOCAB, (batch,), generator=generator).tolist()


# The reference itself


def test_reference_reads_a_tree_like_its_paths(targets):
    """If this fails, the reference's own mask or positions are wrong and no other test here means anything."""
    model, _ = targets
    tree = from_paths(7, [(1,), (2,), (1, 3), (2, 3), (2, 4), (2, 4, 1)])
    committed = [5, 9, 2, 140]
    _, logits = reference.verify(model, committed, tree)
    for path, row in zip([(), (1,), (2,), (1, 3), (2, 3), (2, 4), (2, 4, 1)], logits):
        tokens = torch.tensor([[*committed, 7, *path]], device=model.device)
        with torch.no_grad():
            alone = model(tokens).logits[0, -1]  # transformers' own mask and positions
        assert worst(mx.array(to_numpy(row)), alone) < 1e-4


# Drafter


def test_drafter_logits(drafters, embedding):
    """If this fails, the recurrence or the head is another function than the weights were trained for."""
    theirs, ours = drafters
    table, rows = embedding
    contexts, _ = random_contexts(3)
    tokens = torch.randint(VOCAB, (4, 3), generator=torch.Generator().manual_seed(4))
    projected = ours.project_context(mx.array(to_numpy(contexts)))
    state, our_state = theirs.first_state(contexts), None
    for step in tokens:
        state = theirs.advance(table(step.to(reference.DEVICE)), state)
        our_state = ours.advance(rows(mx.array(step.numpy())), our_state)
        assert worst(our_state, state) < 1e-4
        assert worst(ours.logits(projected, our_state), theirs.logits(contexts, state)) < 1e-4


def test_input_projection_splits_into_context_then_state():
    """If this fails, the halves of Apple's input_proj are the wrong way round: drafts from real weights are noise."""
    theirs = torch_drafter(VOCAB, HIDDEN, 40, 2, True)
    contexts, _ = random_contexts(2)
    states = contexts.flip(-1) + 0.5
    h, s = mx.array(to_numpy(contexts)), mx.array(to_numpy(states))
    config = DrafterConfig(VOCAB, HIDDEN, 40, 2, True)
    errors = []
    for h_first in (True, False):
        ours = build_drafter(config, renamed(theirs, h_first), "the reference")
        errors.append(worst(ours.logits(ours.project_context(h), s), theirs.logits(contexts, states)))
    assert errors[0] < 1e-4
    assert errors[1] > 0.1  # the weights tell the halves apart


def test_quantized_drafter():
    """If this fails, a quantised drafter is another function than its own weights, unpacked."""
    ours = to_mlx(torch_drafter(VOCAB, 64, 96, 2, True))
    quantize_drafter(ours, group_size=32, bits=4)
    theirs = to_torch(ours)
    h, s = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(8)).to(reference.DEVICE)
    state = ours.advance(mx.array(to_numpy(h)), mx.array(to_numpy(s)))
    assert worst(state, theirs.advance(h, s)) < 1e-4
    logits = ours.logits(ours.project_context(mx.array(to_numpy(h))), mx.array(to_numpy(s)))
    assert worst(logits, theirs.logits(h, s)) < 1e-4


def test_converted_checkpoint(drafters, embedding, tmp_path):
    """If this fails, `convert drafter` gives Apple's tensors to the wrong places."""
    converter = pytest.importorskip("mlx_redrafter.convert.drafter", reason="the package is not installed")
    theirs, _ = drafters
    config = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "exit_dim": theirs.exit_dim,
        "num_draft_layers": theirs.num_draft_layers,
        "rnn": theirs.rnn,
    }
    (tmp_path / "apple").mkdir()
    (tmp_path / "apple" / "config.json").write_text(json.dumps(config))
    torch.save(theirs.state_dict(), tmp_path / "apple" / "model.pt")
    ours = load_drafter(converter.convert_drafter(str(tmp_path / "apple"), str(tmp_path / "converted")))
    contexts, roots = random_contexts(2)
    table, rows = embedding
    state = theirs.advance(table(torch.tensor(roots, device=contexts.device)), theirs.first_state(contexts))
    our_state = ours.advance(rows(mx.array(roots)), None)
    projected = ours.project_context(mx.array(to_numpy(contexts)))
    assert worst(ours.logits(projected, our_state), theirs.logits(contexts, state)) < 1e-4


# Beams and trees


def search_both(drafters, embedding, width: int, length: int, batch: int = 3):
    """The same beam search on both sides: MLX's over the whole batch, the reference's row by row."""
    theirs, ours = drafters
    table, rows = embedding
    contexts, roots = random_contexts(batch)
    beam = beam_search(ours, rows, mx.array(to_numpy(contexts)), mx.array(roots, mx.int32), width, length)
    found = [
        reference.beam_search(theirs, table, context, root, width, length) for context, root in zip(contexts, roots)
    ]
    return beam, found, roots


def assert_same_beams(beam: Beam, found: list[list[list[reference.Hypothesis]]]) -> None:
    for b, steps in enumerate(found):
        assert beam.tokens[b].tolist() == [[h.tokens[-1] for h in step] for step in steps]
        log_probs = np.array([[h.log_prob for h in step] for step in steps])
        assert np.abs(np.array(beam.log_probs[b]) - log_probs).max() < 1e-4
        assert beam.sequences()[b].tolist() == [list(h.tokens) for h in steps[-1]]


def path_to(row: int, parents: list[int], tokens: list[int]) -> tuple[int, ...]:
    return () if row == 0 else (*path_to(parents[row], parents, tokens), tokens[row])


def assert_same_tree(ours: CandidateTree, batch_row: int, theirs: reference.Tree) -> None:
    """Compares the rows that count, in the reference's order: ours only has parents before their children."""
    parents, tokens = ours.parents[batch_row].tolist(), ours.tokens[batch_row].tolist()
    assert all(parent < row for row, parent in enumerate(parents) if row)
    found = {path_to(r, parents, tokens): r for r, valid in enumerate(ours.valid[batch_row].tolist()) if valid}
    assert len(found) == sum(ours.valid[batch_row].tolist()) == len(theirs.tokens)  # none is there twice
    kept = [found[path_to(row, theirs.parents, theirs.tokens)] for row in range(len(theirs.tokens))]
    number = {row: index for index, row in enumerate(kept)}
    assert [ours.tokens[batch_row, row].item() for row in kept] == theirs.tokens
    assert [number[parents[row]] for row in kept] == theirs.parents
    assert [ours.depths[batch_row, row].item() for row in kept] == theirs.depths
    mask = np.array(ours.ancestors[batch_row])[kept]
    assert mask[:, kept].tolist() == theirs.ancestors
    assert mask.sum() == mask[:, kept].sum()  # nor does a row that counts look at one that does not
    assert max(theirs.depths) <= ours.max_depth


@pytest.mark.parametrize(("width", "length"), sorted({shape[:2] for shape in SHAPES} | {(20, 3)}))
def test_beams(drafters, embedding, width, length):
    """If this fails, drafts are not the drafter's most probable ones, or their probabilities are wrong."""
    beam, found, _ = search_both(drafters, embedding, width, length, batch=2)
    assert_same_beams(beam, found)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("width", "length", "nodes"), SHAPES)
def test_trees(drafters, embedding, width, length, nodes, policy):
    """If this fails, the target checks other nodes than the policy says, or connects them wrongly."""
    beam, found, roots = search_both(drafters, embedding, width, length)
    for count in sorted({1, nodes, width * (length - 1)}):
        tree = candidate_tree(beam, mx.array(roots, mx.int32), count, policy)
        assert tree.rows == 1 + count
        for b, (steps, root) in enumerate(zip(found, roots)):
            assert_same_tree(tree, b, reference.candidate_tree(steps, root, count, policy))


# Acceptance and verification


def random_tree(random: np.random.Generator, rows: int, vocab: int) -> reference.Tree:
    paths = [()]
    while len(paths) < rows:
        path = (*paths[random.integers(len(paths))], int(random.integers(vocab)))
        if path not in paths:
            paths.append(path)
    return from_paths(int(random.integers(vocab)), sorted(paths[1:], key=len))


def to_candidate_tree(trees: list[reference.Tree], fillers: tuple[int, ...] = ()) -> CandidateTree:
    """Trees of equally many rows as one batch; `fillers` are tokens of rows behind them that do not count."""
    tokens = mx.array([[*t.tokens, *fillers] for t in trees])
    parents = mx.array([t.parents + [0] * len(fillers) for t in trees])
    valid = mx.broadcast_to(mx.arange(tokens.shape[1]) < len(trees[0].tokens), tokens.shape)
    return CandidateTree.from_parents(tokens, parents, max(max(t.depths) for t in trees), valid)


def test_acceptance():
    """If this fails, tokens that the target did not choose get through, or chosen ones are thrown away."""
    random = np.random.default_rng(5)
    trees = [random_tree(random, rows=12, vocab=3) for _ in range(200)]
    choices = random.integers(3, size=(len(trees), 15))
    tree_batch = to_candidate_tree(trees, fillers=(0, 1, 2))  # one of them agrees with the root's choice
    accepted = accept(tree_batch, mx.array(choices, mx.int32))
    counts = []
    for b, (tree, row_choices) in enumerate(zip(trees, choices.tolist())):
        path = reference.accept(tree, row_choices)
        counts.append(len(path) - 1)
        assert accepted.count[b].item() == counts[-1]
        assert accepted.path[b].tolist() == path + path[-1:] * (tree_batch.max_depth - counts[-1])
        assert accepted.tokens[b].tolist()[: len(path)] == [row_choices[row] for row in path]
        assert accepted.last[b].item() == path[-1]
        assert accepted.root[b].item() == row_choices[path[-1]]
    assert {0, 1, 2, 3} <= set(counts)


def read_prompts(verifier: Verifier, prompts: list[list[int]]) -> tuple[KVCache, mx.array, mx.array]:
    """A cache that holds the prompts and is ready for trees; hidden states and logits at their ends."""
    cache = verifier.make_cache()
    hidden, logits = prefill(verifier.target, mx.array(prompts), cache.layers, DecodingOptions(prefill_step_size=5))
    cache.begin_trees(len(prompts))
    return cache, hidden, logits


def test_target_at_every_node(targets):
    """If this fails, verification gives nodes a wrong position or a wrong view, or commits wrong rows of the cache."""
    model, verifier = targets
    random = np.random.default_rng(6)
    committed = random.integers(VOCAB, size=(2, 9)).tolist()
    cache, _, _ = read_prompts(verifier, committed)
    for _ in range(3):  # from the second tree on, the cache holds what the commit before left there
        trees = [random_tree(random, rows=9, vocab=VOCAB) for _ in committed]
        hidden, logits = verifier(to_candidate_tree(trees), cache)
        paths = []
        for b, tree in enumerate(trees):
            their_hidden, their_logits = reference.verify(model, committed[b], tree)
            assert worst(hidden[b], their_hidden) < 1e-3
            assert worst(logits[b], their_logits) < 1e-3
            deepest = int(np.argmax(tree.depths))
            paths.append([row for row in range(9) if tree.ancestors[deepest][row]])
            committed[b] += [tree.tokens[row] for row in paths[-1]]
        counts = [len(path) - 1 for path in paths]
        padded = [(path + path[-1:] * 9)[1 : 1 + max(counts)] for path in paths]
        cache.commit(mx.array(padded, mx.int32), mx.array(counts, mx.int32), max(counts))


# Whole generations


def assert_same_generation(model, verifier, theirs, ours, prompt, count, shape: DraftShape, expected=None) -> float:
    """The reference's two ways and MLX's agree, step by step; returns the mean acceptance length."""
    text, rows = expected or reference.plain(model, prompt, count)
    numbers = (shape.beam_width, shape.beam_length, shape.num_draft_tokens, shape.tree_policy)
    steps = reference.speculative(model, theirs, prompt, count, *numbers)
    assert [token for step in steps for token in step][:count] == text
    proposer, options = RecurrentProposer(ours, verifier.target.embed, shape), DecodingOptions(max_tokens=count)
    produced = list(speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options))
    assert [part.tokens for part in produced] == steps
    logits = mx.concatenate([part.logits[: len(part.tokens)] for part in produced])[:count]
    assert worst(logits, rows) < 1e-3
    lengths = [len(step) for step in steps[1:]]
    return sum(lengths) / len(lengths)


def memorised(model: LlamaForCausalLM, prompt: list[int], text: list[int], exit_dim: int, rnn: bool, updates: int):
    config = model.config
    drafter = torch_drafter(config.vocab_size, config.hidden_size, exit_dim, 1, rnn, spread=0.5)
    memorise(drafter, model, prompt + text, updates)
    return drafter, to_mlx(drafter)


def test_generation(targets):
    """If this fails, drafting changes the text, or a step accepts another number of tokens than it should."""
    model, verifier = targets
    prompt, count = [3, 1, 4, 1, 5, 9, 2, 6], 30
    expected = reference.plain(model, prompt, count)
    lengths = []
    for exit_dim, rnn in ((40, True), (2 * HIDDEN, False)):
        pair = memorised(model, prompt, expected[0], exit_dim, rnn, updates=15)
        for width, length, nodes, policy in (
            (1, 4, 3, "beams"),
            (2, 4, 3, "best-first"),
            (4, 5, 8, "best-first"),
            (4, 5, 16, "beams"),
        ):
            shape = DraftShape(width, length, nodes, policy)
            lengths.append(assert_same_generation(model, verifier, *pair, prompt, count, shape, expected))
    assert max(lengths) > 1.2  # drafts were accepted, so accepting them was tested
    assert min(lengths) < 4  # and rejected


def test_generation_from_a_long_prompt(targets):
    """If this fails, a cache that grows while trees are read loses or hides rows."""
    model, verifier = targets
    prompt, count = np.random.default_rng(7).integers(VOCAB, size=245).tolist(), 24
    expected = reference.plain(model, prompt, count)
    pair = memorised(model, prompt[-8:], expected[0], 40, True, updates=15)
    assert_same_generation(model, verifier, *pair, prompt, count, DraftShape(3, 4, 6), expected)


def test_steps_of_a_batch(targets):
    """If this fails, rows of a batch that accept different numbers of tokens disturb one another."""
    model, verifier = targets
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 2, 3, 5, 8]]
    texts = [reference.plain(model, prompt, 20)[0] for prompt in prompts]
    theirs, ours = memorised(model, prompts[0], texts[0], 40, True, updates=20)
    cache, hidden, logits = read_prompts(verifier, prompts)
    proposer = RecurrentProposer(ours, verifier.target.embed, DraftShape(3, 4, 6))
    step = SpeculativeStep(verifier, proposer, DecodingOptions(), cache, hidden, mx.argmax(logits, axis=-1))
    found = [[[int(token)]] for token in step.root]
    for _ in range(6):
        submitted = step()
        for b, count in enumerate(submitted.count.tolist()):
            found[b].append(submitted.tokens[b, : count + 1].tolist())
    for prompt, text, steps in zip(prompts, texts, found):
        made = sum(map(len, steps))
        assert reference.speculative(model, theirs, prompt, made, 3, 4, 6, "best-first") == steps
        assert [token for step in steps for token in step][:20] == text[:made]
    assert len({sum(map(len, steps)) for steps in found}) > 1


def test_generation_of_stories():
    """If this fails, a trained target with grouped heads of 8 dimensions is not decoded as PyTorch does."""
    if not STORIES.is_dir():
        pytest.skip(f"no {STORIES.name} in ../shared/models next to the checkout")
    model, verifier = torch_target(STORIES), mlx_target(STORIES)
    prompt, count = [1, 403, 407, 261, 378], 48  # "Once upon a time"
    expected = reference.plain(model, prompt, count)
    pair = memorised(model, prompt, expected[0], 96, True, updates=25)
    mean = assert_same_generation(model, verifier, *pair, prompt, count, DraftShape(3, 5, 7), expected)
    assert mean > 1.2


@pytest.mark.parametrize("draft", ["random", "embedded"])
def test_generation_of_the_embedded_target(draft):
    """If this fails, the pair that ships with the package does not write what PyTorch writes."""
    if draft == "embedded":
        if not (EMBEDDED / "drafter").is_dir():
            pytest.skip("no drafter in mlx_redrafter/embedded")
        ours = load_drafter(EMBEDDED / "drafter")
        if ours.config.quantization is None:
            ours.set_dtype(mx.float32)
        theirs = to_torch(ours)
    else:
        theirs = torch_drafter(4096, 384, 128, 1, True)
        ours = to_mlx(theirs)
    model, verifier = torch_target(EMBEDDED / "target"), mlx_target(EMBEDDED / "target")
    prompt = [500, 12, 340, 290, 1200, 77]
    count = 48 if draft == "embedded" else 8  # random drafts are never accepted: more steps show nothing more
    mean = assert_same_generation(model, verifier, theirs, ours, prompt, count, DraftShape(4, 5, 12))
    assert draft == "random" or mean > 1.2
