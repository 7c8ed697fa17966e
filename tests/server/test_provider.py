"""Targets and drafters by name: which are loaded, and which stay."""

from __future__ import annotations

import shutil

import pytest
from support import DATA
from support.serving import TINY, parsed

from mlx_redrafter import DraftShape
from mlx_redrafter.server import provider as module
from mlx_redrafter.server.answers import NoSuchModel
from mlx_redrafter.server.provider import DEFAULT, Provider


@pytest.fixture
def provider():
    made = Provider(parsed(*TINY, "--num-draft-tokens", "3"))
    made.load_default()
    return made


def test_another_drafter_leaves_the_target(provider, tmp_path):
    """If this fails, a request with a drafter of its own makes everybody wait for the target."""
    target, first = provider.model, provider.drafter
    other = shutil.copytree(DATA / "tiny-drafter", tmp_path / "other")
    provider.load(DEFAULT, None, str(other))
    assert provider.model is target and provider.drafter is not first and provider.drafter is not None
    for name in ("none", DEFAULT, "tiny-drafter", TINY[3]):
        provider.load("tiny", None, name)
        assert provider.model is target and provider.drafter is (None if name == "none" else first)


def test_only_the_last_few_drafters_stay(provider, tmp_path):
    for i in range(6):
        provider.load(DEFAULT, None, str(shutil.copytree(DATA / "tiny-drafter", tmp_path / str(i))))
    assert len(provider._drafters) == module.MOST_DRAFTERS


def test_another_target_has_none_of_our_drafters(provider, parrot, monkeypatch):
    """If this fails, a target gets drafts that are not for it, or two targets have to fit into memory."""
    load = module.load

    def alone(*names, **named):
        assert provider.model is provider.target is provider.drafter is None
        return load(*names, **named)

    monkeypatch.setattr(module, "load", alone)
    provider.load(str(parrot), None, DEFAULT)
    assert provider.drafter is None and provider.model_key == (str(parrot), None, None)
    provider.load(DEFAULT, None, DEFAULT)
    assert provider.drafter is not None


def test_what_does_not_fit_changes_nothing(provider, parrot):
    """If this fails, one wrong name leaves all without a model."""
    target = provider.model
    for names in (
        ("/nowhere", None, DEFAULT),
        (DEFAULT, None, "/nowhere"),
        (DEFAULT, None, str(parrot / "drafter")),
        (DEFAULT, "/nowhere", None),
        (DEFAULT, None, "mtp"),
        (str(parrot), None, "mtp"),
    ):
        with pytest.raises(NoSuchModel):
            provider.load(*names)
        assert provider.model is target


def test_code_of_others_is_not_trusted(parrot, monkeypatch):
    """If this fails, a request can name a directory whose code then runs here."""
    seen = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda *names, **named: seen.append(named) or load(*names, **named))
    made = Provider(parsed(*TINY, "--num-draft-tokens", "3", "--trust-remote-code"))
    made.load_default()
    made.load(str(parrot))
    assert [named["trust_remote_code"] for named in seen] == [True, False]
    assert [named["tokenizer_config"].get("trust_remote_code", False) for named in seen] == [True, False]


def test_draft_models_that_are_no_drafters(served):
    """If this fails, whoever has an ordinary draft model for mlx_lm's server cannot use it here."""
    fields = {"prompt": "Once upon a time", "max_tokens": 20, "stop": ["the ball"]}
    answer = served.post("/v1/completions", **fields, draft_model=TINY[1])
    assert answer["choices"] == served.post("/v1/completions", **fields)["choices"]
    assert answer["timings"]["method"] == "draft model" and answer["usage"]["accepted_tokens"] > 10


@pytest.mark.parametrize(
    "flags, wanted, shape",
    [
        ((), None, "auto"),
        ((), 2, DraftShape(1, 3, 2)),
        ((), 1000, DraftShape(1, 32, 31)),
        (("--beam-width", "4"), 2, DraftShape(4, 5, 2)),
        (("--beam-width", "4"), 99, DraftShape(4, 5, 16)),
        (("--num-draft-tokens", "3"), None, DraftShape(1, 4, 3)),
    ],
)
def test_node_budgets(flags, wanted, shape):
    made = Provider(parsed(*TINY, *flags))
    made.load_default()
    assert made.shape_for(wanted) == shape
