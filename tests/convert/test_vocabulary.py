"""`convert drafter --draft-vocab-size`: fewer tokens, the rows of those that stay, the same texts."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import make_drafter
from support.commands import code_of

from mlx_redrafter import generate, load
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.training.text.shards import Recipe, Shard, write_rows

COUNTED = (7, 3, 90, 3, 7, 3, 11, 12, 7, 3)


def rows(folder, tokens=COUNTED):
    """Rows of these tokens, learned, and of others that are held out or not learned."""
    some, none = np.array([[1, *tokens]], np.int32), np.full((1, len(tokens) + 1), 60, np.int32)
    shards = [Shard(some, np.arange(some.shape[1])[None] > 0), Shard(none, np.ones(none.shape, bool))]
    write_rows(folder, Recipe({"data": ["x"]}, some.shape[1], 1, lambda k, progress: shards[k], True))
    return str(folder)


def convert(source, out, *flags):
    return code_of("convert", "drafter", "--hf-path", str(source), "--mlx-path", str(out), *flags)


@pytest.mark.parametrize("kind", ["own", "tied", "quantised"])
def test_the_most_frequent_tokens_stay(kind, tmp_path):
    """If this fails, a smaller vocabulary drafts other tokens than it says, or worse than before."""
    before = make_drafter()
    if kind == "tied":
        before = RecurrentDrafter(DrafterConfig(97, 32, 32, 2, tie_output=True))
    before.config.right_by_depth = (0.5, 0.25)
    if kind == "quantised":
        before.quantize(32, 8)
    before.save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--draft-vocab-size", "5", "--text", rows(tmp_path / "text")) == 0
    after = open_drafter(tmp_path / "b")
    kept = [3, 7, 11, 12, 90]
    assert after.vocab_map.tolist() == kept and after.config.right_by_depth == (0.5, 0.25)
    old, new = dict(tree_flatten(before.parameters())), dict(tree_flatten(after.parameters()))
    for name, value in new.items():
        if name.startswith("lm_head."):
            assert mx.array_equal(value, old[name][mx.array(kept)])
        elif name != "vocab_map":
            assert mx.array_equal(value, old[name])
    assert ("lm_head.weight" in new) == (kind != "tied")
    # Once more, and quantised on the way: ids are those of the target still.
    flags = [
        "--draft-vocab-size",
        "2",
        "--text",
        rows(tmp_path / "other", (90, 12, 90, 50, 50, 50)),
        "-q",
        "--q-bits",
        "8",
    ]
    assert convert(tmp_path / "b", tmp_path / "c", *flags, "--q-group-size", "32") == 0
    fewest = open_drafter(tmp_path / "c")
    assert fewest.vocab_map.tolist() == [12, 90] and fewest.config.quantization == {"group_size": 32, "bits": 8}


def test_texts_stay_what_they_are(stories, stories_pair, tmp_path):
    """If this fails, a smaller vocabulary changes what the target says."""
    model, drafter, tokenizer = stories_pair
    text = rows(tmp_path / "text", tokenizer.encode("Once upon a time there was a little girl. She had a dog.")[1:])
    drafter.save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--draft-vocab-size", "12", "--text", text) == 0
    _, smaller, _ = load(str(stories), str(tmp_path / "b"), dtype="float32")
    assert smaller.config.scored == 12
    texts = [generate(model, tokenizer, "Once upon a time", drafter=d, max_tokens=40) for d in (None, smaller)]
    assert texts[0] == texts[1]


def test_mistakes(tmp_path, capsys):
    """If this fails, a mistake costs a drafter, or ends in a traceback."""
    make_drafter().save(tmp_path / "a")
    MedusaHeads(MedusaConfig(97, 32, 2)).save(tmp_path / "medusa")
    text, beyond = rows(tmp_path / "text"), rows(tmp_path / "beyond", (97, 5))
    capsys.readouterr()
    for source, flags, message in (
        ("a", ["--draft-vocab-size", "5"], "--draft-vocab-size and --text: expected both or neither"),
        ("a", ["--draft-vocab-size", "97", "--text", text], "--draft-vocab-size is 97, expected fewer than the 97"),
        ("a", ["--draft-vocab-size", "5", "--text", beyond], "has tokens beyond the drafter's 97"),
        ("medusa", ["--draft-vocab-size", "5", "--text", text], "is no ReDrafter head, which alone can lose tokens"),
    ):
        assert convert(tmp_path / source, tmp_path / "out", *flags) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1 and not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == 97
