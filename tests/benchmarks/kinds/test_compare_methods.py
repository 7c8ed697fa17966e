"""`mlx-redrafter bench compare` from the command to its files, on the embedded pair."""

import json

import mlx.core as mx
import pytest
from mlx_redrafter.benchmarks.competitors import SETTINGS
from support import SHARED
from support.bench import refused
from support.pages import traced_figures

from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED

FLAGS = ["--temps", "0", "--num-prompts", "1", "--search-prompts", "1", "--prompt-tokens", "24", "-m", "6"]


def bench(*flags):
    return main(["bench", "compare", *FLAGS, *map(str, flags)])


@pytest.fixture(scope="module")
def heads(pair, tmp_path_factory):
    """Four random Medusa heads without blocks."""
    target, folder = Target(pair[0]), tmp_path_factory.mktemp("medusa")
    mx.random.seed(0)
    MedusaHeads(MedusaConfig(target.vocab_size, target.hidden_size, 4, 0)).save(folder)
    return folder


@pytest.fixture(scope="module")
def eagle(pair, tmp_path_factory):
    """A random EAGLE-3 head with the target's output layer."""
    target, folder = Target(pair[0]), tmp_path_factory.mktemp("eagle")
    mx.random.seed(1)
    layer = {"hidden_size": target.hidden_size, "intermediate_size": 32, "num_attention_heads": 2}
    EagleHead(EagleConfig(target.vocab_size, target.hidden_size, layer | {"rms_norm_eps": 1e-5}, tie_output=True)).save(
        folder
    )
    return folder


def test_a_comparison(heads, eagle, tmp_path, capsys, monkeypatch):
    """If this fails, a method is missing or changes the text, or the three files tell different things."""
    for name, settings in list(SETTINGS.items()):
        monkeypatch.setitem(SETTINGS, name, settings[:2])
    draft = SHARED / "models" / "tinypy-draft"
    given = ["--draft-model", draft] if draft.exists() else []
    out = tmp_path / "out"
    assert bench("--medusa", heads, "--eagle", eagle, *given, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"compare.{s}" for s in ("html", "json", "md", "png")]
    data = json.loads((out / "compare.json").read_text())
    text, page = (out / "compare.md").read_text(), (out / "compare.html").read_text()
    names = [name for name in SETTINGS if given or not name.startswith("draft model")]
    assert [row["method"] for row in data["rows"]] == names
    assert [sentence for sentence in data["left_out"] if "draft model" in sentence] == (
        [] if given else ["a draft model takes no part: --draft-model was not given."]
    )
    assert f"All {len(names) - 1} texts that were drafted equal plain mlx_lm's, token for token." in text
    assert traced_figures(page, data) > 50
    for row in data["rows"]:
        assert row["equal"] == row["runs"] == 1
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / data["rows"][0]["tokens_per_second"])
        assert f'data-row="{row["id"]}"' in page
        assert any(f"| {row['setting']} | {row['tokens_per_second']:.1f} |" in line for line in text.splitlines())
        assert row["setting"] in SETTINGS[row["method"]]
        assert (row["acceptance"] == 1) == (sum(row["by_position"]) == 0)
        assert (row["drafter_bytes"] > 0) == (row["method"] not in ("plain", "lookup"))
    tried = [(one["method"], one["setting"]) for one in data["search"]]
    assert tried == [(name, s) for name in names for s in SETTINGS[name] if len(SETTINGS[name]) > 1]
    for name in {name for name, _ in tried}:
        some = [one for one in data["search"] if one["method"] == name]
        [best] = [one for one in some if one["best"]]
        assert best["tokens_per_second"] == max(one["tokens_per_second"] for one in some)
        assert best["setting"] == next(row["setting"] for row in data["rows"] if row["method"] == name)


MISTAKES = {
    "no such heads": (["--medusa", "/no/such"], "--medusa /no/such: no such directory"),
    "heads of another kind": (
        ["--medusa", EMBEDDED / "drafter"],
        "is a drafter of the kind redrafter",
    ),
    "a head of another kind": (
        ["--eagle", EMBEDDED / "drafter"],
        "expected EAGLE-3",
    ),
    "no such draft model": (["--draft-model", "/no/such"], "--draft-model /no/such: no such directory"),
    "a temperature": (["--temps", "nan"], "--temps is nan"),
    "rounds": (["--repeats", "0"], "--repeats is 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, capsys):
    flags, message = MISTAKES[name]
    assert message in refused(capsys, "compare", *FLAGS, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_for_another_target(heads, stories, tmp_path, capsys):
    """If this fails, the mistake shows as a traceback from deep inside, or as a text that differs."""
    assert bench("--draft-model", stories) == 2
    assert f"--draft-model {stories}: is a model with another tokenizer" in capsys.readouterr().err
    MedusaHeads(MedusaConfig(97, 32, 4, 0)).save(tmp_path / "small")
    assert bench("--medusa", tmp_path / "small") == 2
    assert f"--medusa {tmp_path / 'small'}" in capsys.readouterr().err
    assert bench("--draft", heads) == 2
    assert "is no recurrent drafter; --medusa and --eagle take heads" in capsys.readouterr().err
