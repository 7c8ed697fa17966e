"""The doctor's verdicts on texts, products and memory; its report, and what the command returns."""

import json
import weakref

import mlx.core as mx
import pytest
from support import make_drafter, make_model

from mlx_redrafter.cli.main import main
from mlx_redrafter.doctor import command, float32_precision, memory, texts
from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, NOTE, OK, Check, guarded
from mlx_redrafter.doctor.comparison import Places
from mlx_redrafter.doctor.report import Report
from mlx_redrafter.doctor.weight_types import Variant
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target import verification


@pytest.fixture
def quick(monkeypatch, pair):
    """Shorter texts, of fewer prompts."""
    monkeypatch.setattr(command, "PROMPTS", texts.PROMPTS[:1])
    monkeypatch.setattr(memory, "TOKENS", 8)
    monkeypatch.setattr(texts, "TOKENS", 8)


@pytest.fixture
def two_places(monkeypatch):
    places = Places(mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
    monkeypatch.setattr(Places, "here", classmethod(lambda cls: places))
    return places


def test_the_command(quick, two_places, tmp_path, capsys):
    """Every kind of check is made and is well; text and JSON say the same."""
    file = tmp_path / "report.json"
    assert main(["doctor", "--report", str(file)]) == 0
    out, fields = capsys.readouterr().out, json.loads(file.read_text())
    names = {check["name"]: check for check in fields["checks"]}
    assert {check["status"] for check in names.values()} <= {OK, NOTE} and fields["failed"] == []
    assert {"float32 products", "tree building", "beam search", "commit", "memory", "costs of a step"} <= set(names)
    assert {"texts, float32", "texts, float32, sampled", "texts, bfloat16", "texts, 4-bit"} <= set(names)
    assert names["texts, float32"]["figures"]["texts"] == names["texts, float32"]["figures"]["equal"] == 2
    assert fields["costs"]["verify"] and fields["choice"] in out
    assert all(f"  {check['status']:<6}  {name}" in out for name, check in names.items())
    assert "mlx-lm" in fields["facts"]["versions"] and fields["facts"]["device"] in out
    assert f"All is well: {len(names)} checks" in out


def test_your_pair_that_is_broken(quick, two_places, tmp_path, capsys, monkeypatch, small_directory):
    """If this fails, the exit code says that all is well where it is not."""
    whole = verification.accept

    def accept(tree, choices):
        found = whole(tree, choices)
        found.root = (found.root + 1) % 97
        return found

    monkeypatch.setattr("mlx_redrafter.decoding.step.accept", accept)
    file = tmp_path / "report.json"
    assert main(["doctor", *small_directory, "--dtype", "float32", "--report", str(file)]) == 1
    out, fields = capsys.readouterr().out, json.loads(file.read_text())
    assert {"texts, float32", "texts, float32, sampled"} == set(fields["failed"])
    assert "2 of" in out and "more than rounding explains; please report this" in out
    pairs = {check["pair"] for check in fields["checks"]}
    assert pairs == {command.NO_PAIR, command.EMBEDDED, command.YOUR_PAIR}
    mine = {check["name"] for check in fields["checks"] if check["pair"] == command.YOUR_PAIR}
    assert {"beam search", "verification of a tree"} <= mine and "verification of a chain" not in mine


@pytest.fixture
def small_directory(tmp_path, pair):
    """Flags for a small pair on disk."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import save_config

    from mlx_redrafter.text.loading import EMBEDDED

    target, drafter = tmp_path / "target", tmp_path / "drafter"
    target.mkdir()
    model = make_model(vocab=4096, hidden=64)
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config({k: v for k, v in vars(model.args).items() if v is not None}, target / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((EMBEDDED / "target" / name).read_bytes())
    make_drafter(vocab=4096, hidden=64).save(drafter)
    return ["--model", str(target), "--draft", str(drafter)]


def test_mistakes(tmp_path, capsys):
    for flags, words in (
        (["--draft", "none"], "--draft is missing"),
        (["--report", str(tmp_path)], "expected a file in a directory that is there"),
        (["--report", str(tmp_path / "no" / "file")], "expected a file in a directory that is there"),
    ):
        assert main(["doctor", *flags]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def row(*log_probs):
    return mx.array(log_probs)


@pytest.mark.parametrize(
    "drafted, equal, unexplained",
    [
        ([1, 0], 1, 0),
        ([1, 1], 0, 0),  # nearly as probable as 0
        ([2, 0], 0, 1),  # far less probable than 1
        ([1], 0, 1),  # ends too early
    ],
)
def test_texts_that_part(drafted, equal, unexplained):
    """Near ties are rounding, everything else is a mistake, whatever the type of the weights."""
    plain_rows = [row(-9.0, -0.1, -3.0), row(-0.7, -0.7001, -5.0)]

    def write(prompt, shape):
        return ([1, 0] if shape is None else drafted), plain_rows

    def model(tokens):  # says the same of all tokens together, give or take 0.001
        return mx.stack([row(0.0, 0.0, 0.0), *plain_rows])[None] + mx.array([0.0, 0.001, 0.0])

    found = texts.measure(write, model, [[7, 7]], [DraftShape()])
    assert (found.texts, found.equal, found.unexplained) == (1, equal, unexplained)
    assert 5e-4 < found.rounding < 1.5
    check = texts.greedy_check("texts", found, exact=False, reduced=False)
    assert check.status == (OK if equal else FAILED if unexplained else NOTE)
    check = texts.greedy_check("texts", found, exact=True, reduced=True)
    assert check.status == (OK if equal else FAILED)
    assert ("MLX_ENABLE_TF32=0" in check.advice) == (not equal and not unexplained)


@pytest.mark.parametrize(
    "error, status, reduced",
    [(1e-6, OK, False), (3e-4, NOTE, True), (0.5, FAILED, False), (float("nan"), FAILED, False)],
)
def test_products(error, status, reduced):
    check = float32_precision.verdict({1: 1e-7, 8: error})
    assert check.status == status and check.figures["reduced"] == reduced


def test_one_pair_is_in_memory_at_a_time(quick, pair):
    """If this fails, a target that just fits is loaded while the one before it is still there."""
    loaded, alive = [], []

    def load():
        alive.append([thing() is not None for thing in loaded])
        model, drafter = make_model(vocab=4096, hidden=64), make_drafter(vocab=4096, hidden=64)
        loaded.extend([weakref.ref(model), weakref.ref(drafter)])
        return model, drafter, pair[2]

    kinds = [Variant("one", load, exact=True), Variant("two", load, exact=False), Variant("three", load, exact=False)]
    checks = list(command._text_checks(kinds, reduced=False))
    assert [check.status for check in checks] == [OK] * 4
    assert alive == [[], [False] * 2, [False] * 4]


def test_memory_that_was_not_predicted():
    predicted = {"target": 1_000_000_000, "drafter": 100_000_000, "one cache": 50_000_000}
    assert memory.verdict(predicted, 1_200_000_000).status == OK
    assert memory.verdict(predicted, 1_300_000_000).status == FAILED
    assert memory.verdict({"target": 1_000_000}, 8_000_000).status == OK
    assert memory.verdict({"target": 1_000_000}, 10_000_000).status == FAILED


def test_bytes_of_a_cache(small_model):
    # 2 layers, keys and values, 2 heads of width 8, 4 bytes; mlx-lm makes room for 256 rows at a time.
    assert memory.cache_bytes(small_model, 40) == 2 * 2 * 2 * 8 * 4 * 256


def test_reports():
    """Failures are named with what to do about them; what was not made is said once per reason."""
    checks = [
        Check("drafter", OK, "apart by 1e-06 at most"),
        Check("beam search", FAILED, "beams differ", "please report this"),
        Check("commit", NOT_MADE, "no GPU"),
        Check("sampling", NOT_MADE, "no GPU"),
    ]
    report = Report({"device": "a device"}, {"A pair": checks})
    lines = report.text().splitlines()
    assert "  not made (no GPU): commit, sampling" in lines
    assert lines[-2:] == ["1 of 2 checks failed:", "  beam search: beams differ; please report this"]
    assert report.to_dict()["failed"] == ["beam search"]
    report.checks["A pair"].pop(1)
    assert report.text().splitlines()[-1] == "All is well: 1 checks in 0 s; 2 could not be made."


def test_checks_that_break():
    def broken():
        raise RuntimeError("no such\nkernel")

    def mistaken():
        raise UserError("yours")

    [check] = guarded("a check", broken)
    assert check.status == FAILED and check.detail == "RuntimeError: no such kernel"
    with pytest.raises(UserError):
        list(guarded("a check", mistaken))

    def several(last):
        yield Check("the first", OK, "")
        last()

    assert [c.status for c in guarded("the second", lambda: several(broken))] == [OK, FAILED]
    with pytest.raises(UserError):
        list(guarded("the second", lambda: several(mistaken)))
