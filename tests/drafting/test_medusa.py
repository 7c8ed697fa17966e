"""Medusa heads: files, static trees, and text that is the target's own, word for word."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.convert.drafter import convert_drafter
from support import make_model

import mlx_redrafter
from mlx_redrafter import DraftShape, UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.loop import autoregressive, speculative
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import SpeculativeStep, prefill
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.lookup_index import TextIndex
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.medusa_tree import (
    PUBLISHED,
    check_choices,
    fit_choices,
    parents_of,
    rank_accuracies,
    select,
)
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.proposers import MedusaProposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ALL = DraftShape(16, 5, 63)


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


def plainly(model, prompt, count, choose=greedy):
    cache = make_prompt_cache(model)
    return [
        p.tokens[0] for p in autoregressive(Target(model), mx.array([prompt]), cache, DecodingOptions(choose, count))
    ]


def steps_of(model, heads, shape, count, choose=greedy, verifier=None, proposer=None):
    verifier = verifier or verifier_of(model)
    proposer, planner = proposer or MedusaProposer(heads), Planner(Drafted(shape, isinstance(proposer, LookupProposer)))
    cache, options = verifier.make_cache(), DecodingOptions(choose, count)
    return [p.tokens for p in speculative(verifier, proposer, mx.array([PROMPT]), cache, options, planner)]


# Trees


def test_the_published_tree():
    assert len(PUBLISHED) == 63 and len(set(PUBLISHED)) == 63
    assert [sum(len(c) == depth for c in PUBLISHED) for depth in (1, 2, 3, 4)] == [10, 28, 23, 2]
    for count in range(1, 64):
        parents_of(PUBLISHED[:count])  # every beginning of it is a tree
    assert {c for c in PUBLISHED if max(c) < 2} == set(select(PUBLISHED, 2, 4, 63))


def test_a_fitted_tree_is_the_best_one():
    """If this fails, the tree is not the one that calibration data calls for."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        accuracies = [np.sort(rng.dirichlet([0.3] * 4))[::-1].tolist() for _ in range(3)]
        every = {}
        for depth in (1, 2, 3):
            for index in np.ndindex(*[4] * depth):
                every[index] = float(np.prod([accuracies[k][r] for k, r in enumerate(index)]))
        for count in (1, 5, 20, 200):
            choices = fit_choices(accuracies, count)
            best = sorted(every.values(), reverse=True)[:count]
            assert len(choices) == len(set(choices)) == min(count, len(every))
            assert np.isclose(sum(every[c] for c in choices), sum(best))
            parents_of(choices)


def test_accuracies_are_counted():
    """If this fails, a tree is fitted to what heads say about other places."""
    model = make_model()
    heads = make_heads(heads=2, layers=0)
    rows = [PROMPT * 3, PROMPT, [1, 2, 3]]  # the last is too short to say anything
    found = rank_accuracies(Target(model), heads, rows, ranks=4)
    hits, seen = np.zeros((2, 4)), 0
    for row in rows[:2]:
        hidden, _ = Target(model).forward(mx.array([row]), [None] * 2)
        for place in range(len(row) - 3):
            ranked = np.argsort(-np.array(heads(hidden[0, place])), axis=-1)
            seen += 1
            for k in range(2):
                hits[k] += ranked[k, :4] == row[place + k + 2]
    assert hits.sum() > 0 and np.allclose(found, hits / seen)
    with pytest.raises(UserError, match="no text has more than 3 tokens, which 2 heads need"):
        rank_accuracies(Target(model), heads, rows[2:])


def test_a_fitted_tree_is_accepted_further_than_a_wrong_one():
    """If this fails, accuracies and choices do not speak of the same heads and ranks."""
    model = make_model()
    text = plainly(model, PROMPT, 60)
    heads = knowing(make_heads(), model, PROMPT + text[:30])
    accuracies = rank_accuracies(Target(model), heads, [PROMPT + text])
    lengths = []
    for table in (accuracies, [row[::-1] for row in accuracies]):
        heads.config.medusa_choices = fit_choices(table, 6)
        lengths.append(60 / len(steps_of(model, heads, DraftShape(10, 5, 6), 60)))
    assert lengths[0] > lengths[1] + 0.2


@pytest.mark.parametrize(
    "shape, expected",
    [
        (ALL, PUBLISHED),
        (DraftShape(), [(0,), (0, 0), (0, 0, 0)]),
        (DraftShape(1, 8, 7), [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]),
        (DraftShape(3, 3, 5), [(0,), (0, 0), (1,), (0, 1), (2,)]),
    ],
    ids=str,
)
def test_candidates_are_the_heads_best_tokens(shape, expected):
    """If this fails, a path is put together from the wrong heads or the wrong ranks."""
    heads = make_heads()
    context, root = mx.random.normal((2, 32)), mx.array([5, 6])
    tree = MedusaProposer(heads).propose(context, root, Drafted(shape))
    ranked = np.argsort(-np.array(heads(context)), axis=-1)
    assert tree.rows == 1 + len(expected) and tree.max_depth == max(map(len, expected))
    assert tree.in_order == (shape.beam_width == 1)
    for b in range(2):
        assert tree.tokens[b, 0].item() == [5, 6][b]
        for row, choice in enumerate(expected, 1):
            path, at = [], row
            while at:
                path.insert(0, tree.tokens[b, at].item())
                at = tree.parents[b, at].item()
            assert path == [ranked[b, k, rank] for k, rank in enumerate(choice)]


# Decoding


@pytest.mark.parametrize("temp", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("shape", [ALL, DraftShape(), DraftShape(4, 4, 9)], ids=str)
def test_equals_plain_decoding(shape, temp):
    """If this fails, Medusa changes the text, which only its own typical acceptance may."""
    model, choose = make_model(), position_keyed(temp, seed=3)
    text = plainly(model, PROMPT, 40, choose)
    heads = knowing(make_heads(), model, PROMPT + text)
    steps = steps_of(model, heads, shape, 40, choose)
    assert [token for step in steps for token in step][:40] == text
    assert max(map(len, steps)) > 2  # drafts were accepted, so accepting them was tested
    assert [t for s in steps_of(model, make_heads(seed=1), shape, 20, choose) for t in s][:20] == text[:20]


def test_on_a_target_that_takes_chains_only(small_model, chains_only):
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN
    steps = steps_of(small_model, make_heads(), ALL, 30, verifier=verifier)
    assert [t for step in steps for t in step][:30] == plainly(small_model, PROMPT, 30)


def test_together_with_lookup(small_model):
    """If this fails, lookup and a static tree do not fit together."""
    text = plainly(small_model, PROMPT, 40)
    for shape in (DraftShape(4, 4, 9), DraftShape()):
        proposer = LookupProposer(MedusaProposer(make_heads()), TextIndex(PROMPT))
        steps = steps_of(small_model, None, shape, 40, proposer=proposer)
        assert [t for step in steps for t in step][:40] == text


def test_a_step_is_one_lazy_graph(small_model, in_one_piece):
    """If this fails, the host waits for the device in the middle of a step."""
    verifier = verifier_of(small_model)
    cache = verifier.make_cache()
    hidden, logits = prefill(verifier.target, mx.array([PROMPT]), cache.layers, DecodingOptions())
    cache.begin_trees()
    root = greedy(logits[:, None], None)[:, 0]
    buffers = [(layer.keys, layer.values) for layer in cache.layers]
    heads = make_heads()

    class Built(Exception):
        pass

    def traced(context, root, length, buffers):
        for layer, (keys, values) in zip(cache.layers, buffers):
            layer.keys, layer.values = keys, values
        cache.length = length
        SpeculativeStep(verifier, MedusaProposer(heads), DecodingOptions(), cache, context, root)(Drafted(ALL))
        raise Built

    with pytest.raises(Built):
        mx.compile(traced)(hidden, root, cache.length, buffers)


# Files


def test_round_trip(tmp_path):
    heads = make_heads(layers=2, medusa_choices=((1,), (1, 0), (0,)))
    heads.save(tmp_path)
    again = open_drafter(tmp_path)
    assert isinstance(again, MedusaHeads) and again.config == heads.config
    context = mx.random.normal((3, 32))
    assert mx.array_equal(again(context), heads(context))
    assert again(context, 2).shape == (3, 2, 97)


def test_quantised(tmp_path):
    heads = make_heads(hidden=64)
    context = mx.random.normal((3, 64))
    before = heads(context)
    heads.quantize(32, 8)
    heads.save(tmp_path)
    again = open_drafter(tmp_path)
    assert again.config.quantization == {"group_size": 32, "bits": 8}
    assert mx.array_equal(again(context), heads(context))
    assert 0 < mx.abs(again(context) - before).max().item() < 0.1
    with pytest.raises(UserError, match="--q-group-size is 64, which does not divide the drafter's hidden_size 32"):
        make_heads().quantize(64, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size is 0, expected a whole number from 1"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"medusa_num_heads": 32}, "medusa_num_heads is 32, expected 1 to 31"),
        ({"medusa_num_heads": 5}, "tensor 'heads.4.blocks.0.linear.weight' is missing"),
        ({"medusa_num_layers": "x"}, "medusa_num_layers is 'x'"),
        ({"medusa_choices": []}, "expected a list of paths"),
        ({"medusa_choices": [[0], [1, 0]]}, "path [1, 0] twice, or before the one it continues"),
        ({"medusa_choices": [[0], [0]]}, "path [0] twice"),
        ({"medusa_choices": [[0], [0, "a"]]}, "path [0, 'a'], expected 1 to 4 ranks from 0 to 63"),
        ({"medusa_choices": [[0] * 5]}, "expected 1 to 4 ranks"),
        ({"quantization": {"bits": 4}}, "expected group_size and bits"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization: --q-group-size is 64"),
        ({"target_fingerprint": 1}, "target_fingerprint is 1, expected an object"),
        ({"hidden_size": 33}, "has shape (32, 32), expected (33, 33)"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, change, message):
    make_heads().save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        open_drafter(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_heads_of_another_model(small_model):
    with pytest.raises(UserError, match="hidden_size is 48, but the target's is 32"):
        check_pair(Target(small_model), make_heads(hidden=48))


def test_choices_are_checked():
    assert check_choices([[0], [0, 3]], 2, "x") == ((0,), (0, 3))


# Conversion


def published(folder, heads, kind="safetensors", prefix="", **config):
    """The files of FasterDecoding's checkpoints: a sequence for each head."""
    weights = {}
    for h, head in enumerate(heads.heads):
        for i, block in enumerate(head.blocks):
            weights |= {f"{prefix}{h}.{i}.linear.{name}": block.linear[name] for name in ("weight", "bias")}
        weights[f"{prefix}{h}.{len(head.blocks)}.weight"] = head.lm_head.weight
    folder.mkdir()
    if kind == "safetensors":
        mx.save_safetensors(str(folder / "medusa_lm_head.safetensors"), weights)
    else:
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        torch.save(state, folder / "medusa_lm_head.pt")
    fields = {"medusa_num_heads": len(heads.heads), "medusa_num_layers": heads.config.medusa_num_layers}
    fields |= {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "transformers_version": "4.34.1"} | config
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("kind, prefix", [("safetensors", ""), ("safetensors", "medusa_head."), ("pt", "")])
def test_published_checkpoints(tmp_path, kind, prefix):
    """If this fails, published heads cannot be read, or their layers change places."""
    heads = make_heads(layers=2)
    source = published(tmp_path / "hf", heads, kind, prefix)
    with pytest.raises(UserError, match="Medusa heads as published; run `mlx-redrafter convert drafter`"):
        open_drafter(source)
    found = open_drafter(convert_drafter(source, str(tmp_path / "mlx")))
    assert found.config == heads.config
    for (name, value), (_, expected) in zip(tree_flatten(found.parameters()), tree_flatten(heads.parameters())):
        assert mx.array_equal(value, expected), name
    again = open_drafter(
        convert_drafter(str(tmp_path / "mlx"), str(tmp_path / "again"), quantize=True, q_group_size=32)
    )
    assert again.config.quantization == {"group_size": 32, "bits": 4}


def test_fewer_heads_than_there_are(tmp_path):
    source = published(tmp_path / "hf", make_heads(heads=5), medusa_num_heads=2)
    assert len(open_drafter(convert_drafter(source, str(tmp_path / "mlx"))).heads) == 2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"medusa_num_layers": 2}, "no output layer was found after 2 residual blocks"),
        ({"medusa_num_heads": 9}, "tensor 'heads.4.blocks.0.linear.weight' is missing"),
        ({"medusa_num_heads": "4"}, "medusa_num_heads is '4'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config(tmp_path, config, message):
    source = published(tmp_path / "hf", make_heads(), **config)
    with pytest.raises(UserError, match=message):
        convert_drafter(source, str(tmp_path / "mlx"))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_of_no_head(tmp_path):
    source = published(tmp_path / "hf", make_heads())
    file = f"{source}/medusa_lm_head.safetensors"
    mx.save_safetensors(file, {**mx.load(file), "0.0.norm.weight": mx.ones((3,))})
    with pytest.raises(UserError, match=r"tensor .0\.0\.norm\.weight. does not belong to Medusa heads"):
        convert_drafter(source, str(tmp_path / "mlx"))
    (tmp_path / "hf" / "medusa_lm_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights; expected medusa_lm_head.safetensors or medusa_lm_head.pt"):
        convert_drafter(source, str(tmp_path / "mlx"))


def test_from_the_shell(tmp_path, capsys, pair):
    """If this fails, --draft does not see that it was given Medusa heads."""
    source = published(tmp_path / "hf", make_heads(vocab=4096, hidden=384, heads=3))
    out = str(tmp_path / "mlx")
    assert main(["convert", "drafter", "--hf-path", source, "--mlx-path", out]) == 0
    assert "hidden size 384 and vocabulary 4096" in capsys.readouterr().out
    texts = []
    for flags in (["--draft", "none"], ["--draft", out, "--beam-width", "4"], ["--draft", out, "--lookup", "on"]):
        assert main(["generate", "-p", "import os", "-m", "12", "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        texts.append(found["tokens"])
    assert found["method"] == "medusa"
    assert texts[0] == texts[1] == texts[2]


def test_the_target_is_noted(tmp_path, stories):
    """If this fails, heads made for one model are used with another and nobody is told."""
    source = published(tmp_path / "hf", make_heads(vocab=512, hidden=64))
    found = open_drafter(convert_drafter(source, str(tmp_path / "mlx"), target=str(stories)))
    assert found.config.target_fingerprint
    _, drafter, _ = mlx_redrafter.load(str(stories), str(tmp_path / "mlx"))
    assert isinstance(drafter, MedusaHeads)
