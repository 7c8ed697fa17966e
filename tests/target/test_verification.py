"""One forward pass over a tree against one forward pass per path, and the path that is accepted."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import quantize_model
from support import make_model

from mlx_redrafter.errors import UserError
from mlx_redrafter.target import operations, probe
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, NONE, TREE, Capability, Verifier, accept

PARENTS = [0, 0, 0, 1, 1, 3, 2, 6]


def random_tree(vocab, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, len(PARENTS)))
    return CandidateTree.from_parents(mx.array(tokens, mx.int32), mx.array([PARENTS] * batch), 4)


def path_to(row):
    path = [row]
    while path[0]:
        path.insert(0, PARENTS[path[0]])
    return path


def differences(model, batch=1, prompt_length=9):
    """Largest difference in hidden state and logits between a tree's rows and plain reading of their paths."""
    verifier = verifier_of(model)
    prompt = mx.random.randint(0, verifier.target.vocab_size, (batch, prompt_length))
    tree = random_tree(verifier.target.vocab_size, batch)
    cache = verifier.make_cache()
    verifier.target.forward(prompt, cache.layers)
    cache.begin_trees(batch)
    hidden, logits = verifier(tree, cache)
    worst_hidden = worst_logits = 0.0
    for row in range(len(PARENTS)):
        tokens = mx.concatenate([prompt, tree.tokens[:, mx.array(path_to(row))]], axis=1)
        alone_hidden, alone = verifier.target.forward(tokens, [PlainKVCache() for _ in model.layers])
        worst_hidden = max(worst_hidden, mx.abs(hidden[:, row] - alone_hidden[:, -1]).max().item())
        worst_logits = max(worst_logits, mx.abs(logits[:, row] - alone[:, -1]).max().item())
    return worst_hidden, worst_logits


@pytest.mark.parametrize("batch", [1, 2])
def test_tree_rows_equal_plain_reading(small_model, batch):
    """If this fails, the target judges drafts by a text that was never written."""
    hidden, logits = differences(small_model, batch)
    assert hidden < 1e-4 and logits < 1e-3


def test_embedded_target(pair):
    hidden, logits = differences(pair[0])
    assert hidden < 1e-3 and logits < 1e-3


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "4-bit"])
def test_rounding_alone_separates_coarse_types(kind):
    """If this fails, half precision or quantised targets lose their tree."""
    model = make_model(hidden=64)
    if kind == "4-bit":
        model, _ = quantize_model(model, {}, 32, 4)
    else:
        model.set_dtype(getattr(mx, kind))
    verifier = verifier_of(model)
    assert verifier.capability == TREE, verifier.reason
    _, logits = differences(model)
    assert logits < 0.5


def test_a_wrong_position_is_noticed(small_model, monkeypatch):
    """If this fails, the self-check accepts a model whose rope it could not reach."""
    right = operations._rope

    def wrong(x, dims, *, offset, **options):
        return right(x, dims, offset=offset + 1 if isinstance(offset, mx.array) else offset, **options)

    monkeypatch.setattr(operations, "_rope", wrong)
    for kind in ("float32", "bfloat16"):
        small_model.set_dtype(getattr(mx, kind))
        found = probe.probe(Target(small_model))
        assert found.kind == NONE and "logits differ" in found.reason


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_per_batch_entry_are_enough_for_trees(small_model, monkeypatch, batch):
    """If this fails, models that know no position per row get chains only, or rows see one another's text."""
    monkeypatch.setattr(operations, "_rope", mx.fast.rope)
    verifier = verifier_of(small_model)
    assert verifier.capability == TREE and verifier.found.split_rows and "as a batch" in verifier.reason
    hidden, logits = differences(small_model, batch)
    assert hidden < 1e-4 and logits < 1e-3


def test_without_a_position_per_token_there_is_a_chain(small_model, chains_only):
    """If this fails, a model whose rope is out of reach gets no drafts at all."""
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN and verifier.reason


def test_caches_that_forget_in_another_way_are_refused(small_model, monkeypatch):
    """If this fails, rejected tokens stay in a cache that cannot give them back."""
    monkeypatch.setattr(type(small_model), "make_cache", lambda self: [RotatingKVCache(max_size=8, keep=4)] * 2)
    verifier = verifier_of(small_model)
    assert verifier.capability == NONE and "RotatingKVCache" in verifier.reason


def test_the_model_is_left_as_it_was(small_model):
    """If this fails, mlx-lm computes something else after ours has run."""
    before = {name: type(module) for name, module in small_model.named_modules()}
    tokens = mx.array([[1, 2, 3, 4]])
    expected = small_model(tokens)
    differences(small_model)
    assert {name: type(module) for name, module in small_model.named_modules()} == before
    assert list(dict(small_model.named_modules())) == list(before) and mx.fast.rope is operations.FAST_ROPE
    assert mx.array_equal(small_model(tokens), expected)
    layer = small_model.layers[0].self_attn
    layer.o_proj = Failing()
    with pytest.raises(ZeroDivisionError):
        Target(small_model).forward(tokens, [PlainKVCache() for _ in small_model.layers])
    assert isinstance(layer.rope, nn.RoPE) and type(small_model.model).__name__ == "LlamaModel"


class Failing(nn.Module):
    def __call__(self, x):
        raise ZeroDivisionError


def test_probed_once_per_model(small_model, monkeypatch):
    calls = []
    original = probe.probe
    monkeypatch.setattr(probe, "probe", lambda target: calls.append(1) or original(target))
    assert verifier_of(small_model).capability == verifier_of(small_model).capability == TREE
    assert len(calls) == 1
    assert all("redrafter" not in name for name, _ in tree_flatten(small_model.parameters()))


def test_who_needs_verification_is_told_where_there_is_none(small_model):
    """If this fails, a benchmark or a training begins with a target that nothing can be drafted for."""
    able = verifier_of(small_model)
    assert able.checked() is able
    with pytest.raises(UserError, match="--model x: cannot verify drafts: it forgets"):
        Verifier(able.target, Capability(NONE, "it forgets")).checked("--model x:")


def test_context_length(pair, small_model):
    assert Target(pair[0]).context_length == 2048
    assert Target(small_model).context_length == 512


#        root 9
#       /  |   \
#      1   2    3        rows 1, 2, 3
#     / \   \
#    4   5   4           rows 4, 5, 6
#    |
#    7                   row 7
BY_HAND = [0, 0, 0, 0, 1, 1, 2, 4]
TOKENS = [9, 1, 2, 3, 4, 5, 4, 7]


def tree_by_hand(valid=None):
    if valid is not None:
        valid = mx.array([valid])
    return CandidateTree.from_parents(mx.array([TOKENS]), mx.array([BY_HAND]), 3, valid)


@pytest.mark.parametrize(
    "choices, count, path, tokens",
    [
        ([8, 0, 0, 0, 0, 0, 0, 0], 0, [0], [8]),  # nothing drafted was right
        ([3, 0, 0, 6, 0, 0, 0, 0], 1, [0, 3], [3, 6]),
        ([1, 5, 0, 0, 0, 2, 0, 0], 2, [0, 1, 5], [1, 5, 2]),
        ([1, 4, 0, 0, 7, 0, 0, 8], 3, [0, 1, 4, 7], [1, 4, 7, 8]),
        # Row 6 agrees with its parent's choice, but the path to it was not taken.
        ([1, 0, 4, 0, 0, 0, 0, 0], 1, [0, 1], [1, 0]),
        # The root is never checked, whatever the target chose at row 0.
        ([9, 0, 0, 0, 0, 0, 0, 0], 0, [0], [9]),
    ],
)
def test_follows_the_target(choices, count, path, tokens):
    """If this fails, text is written that the target would not have written."""
    accepted = accept(tree_by_hand(), mx.array([choices], mx.int32))
    assert accepted.count.item() == count
    assert accepted.path[0].tolist()[: count + 1] == path
    assert accepted.tokens[0].tolist()[: count + 1] == tokens
    assert accepted.root.item() == tokens[-1] and accepted.last.item() == path[-1]
    assert accepted.path.shape == (1, 4)


def test_rows_that_only_fill_the_shape_are_never_accepted():
    valid = [True] * 4 + [False] * 4
    accepted = accept(tree_by_hand(valid), mx.array([[1, 4, 0, 0, 7, 0, 0, 8]], mx.int32))
    assert accepted.count.item() == 1 and accepted.root.item() == 4
    chain = CandidateTree.chain(mx.array([[9, 1, 2]] * 2), mx.array([True, False]))
    accepted = accept(chain, mx.array([[1, 2, 3]] * 2, mx.int32))
    assert accepted.count.tolist() == [2, 0] and accepted.root.tolist() == [3, 1]


@pytest.mark.parametrize("drafted", [[1, 2, 3], [1, 2, 4], [1, 4, 3], [4, 2, 3]])
def test_a_chain_is_accepted_like_the_same_tree(drafted):
    """If this fails, the short way for chains accepts other tokens than the long one for trees."""
    choices, tokens = mx.array([[1, 2, 3, 8]], mx.int32), mx.array([[9, *drafted]], mx.int32)
    chain = CandidateTree.chain(tokens)
    tree = CandidateTree.from_parents(tokens, mx.array([[0, 0, 1, 2]]), 3)
    for field in ("parents", "depths", "ancestors", "valid", "max_depth"):
        assert mx.array_equal(mx.array(getattr(chain, field)), mx.array(getattr(tree, field)))
    short, long = accept(chain, choices), accept(tree, choices)
    assert short.count.item() == [d == c for d, c in zip([*drafted, -1], [1, 2, 3, 8])].index(False)
    count = 1 + short.count.item()
    for field in ("count", "root", "last"):
        assert getattr(short, field).item() == getattr(long, field).item()
    assert short.path[0, :count].tolist() == long.path[0, :count].tolist()
    assert short.tokens[0, :count].tolist() == long.tokens[0, :count].tolist()


def test_random_trees_against_a_walk():
    """If this fails, the masks and gathers disagree with walking the tree from the root."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        parents = [0] + [int(rng.integers(0, i)) for i in range(1, 12)]
        children: dict[int, list[int]] = {}
        tokens = [0] * 12
        for i in range(1, 12):  # siblings differ, as in any merged tree
            tokens[i] = len(children.setdefault(parents[i], []))
            children[parents[i]].append(i)
        choices = rng.integers(0, 3, 12).tolist()
        node, expected = 0, []
        while True:
            expected.append(choices[node])
            following = [c for c in children.get(node, []) if tokens[c] == choices[node]]
            if not following:
                break
            node = following[0]
        one = CandidateTree.from_parents(mx.array([tokens]), mx.array([parents]), 11)
        accepted = accept(one, mx.array([choices], mx.int32))
        assert accepted.tokens[0].tolist()[: accepted.count.item() + 1] == expected
