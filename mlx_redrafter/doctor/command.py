"""`mlx-redrafter doctor`: which checks are made of which pair, and in what order."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, NOTE, OK, REPORT, Check, broken, guarded
from mlx_redrafter.doctor.comparison import Places, compare
from mlx_redrafter.doctor.fixed_stages import fixed_stages
from mlx_redrafter.doctor.float32_precision import products_check
from mlx_redrafter.doctor.memory import active_memory, memory_check
from mlx_redrafter.doctor.pair_stages import every_way, inputs, pair_stages, plain_stage, reading_seconds, tolerances
from mlx_redrafter.doctor.report import Report
from mlx_redrafter.doctor.texts import PROMPTS, SHAPES, TOKENS, greedy_check, greedy_texts, measure, sampled_check
from mlx_redrafter.doctor.weight_types import Variant, variants
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_facts, on_cpu
from mlx_redrafter.system.files import write_json
from mlx_redrafter.system.weights import describe
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import TREE, Capability, verifier_of
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.flags import add_pair_arguments, load_from
from mlx_redrafter.text.loading import load
from mlx_redrafter.tuning.session import session_for

HELP = "check this program on this device; exits with 1 and lists the failed checks"
EMBEDDED_PAIR, YOUR_PAIR, NO_PAIR = "Embedded pair", "Your pair", "Without a model"
PATIENCE = 60.0  # seconds that the stages of a pair may take on the CPU
PLAIN_ADVICE = "mlx-lm's own pass differs between GPU and CPU, without anything of ours: please report it to MLX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    parser.add_argument("--report", metavar="FILE", help="also write the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 where all is well and 1 where a check failed."""
    file = None if args.report is None else pathlib.Path(args.report).expanduser()
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"--report {args.report}: expected a file in a directory that is there")
    begin = time.perf_counter()
    report = examine(args)
    report.seconds = time.perf_counter() - begin
    if file is not None:
        write_json(file, report.to_dict())
    print(report.text())
    return 1 if report.failed else 0


def examine(args: argparse.Namespace, places: Places | None = None) -> Report:
    """All checks: of the device, of the embedded pair, and of the user's where one is named."""
    places = places or Places.here()
    before = active_memory()
    model, drafter, tokenizer = load_from(args)
    if drafter is None:
        raise UserError("--draft is missing: a target is checked together with its drafter")
    facts = device_facts() | {"memory limit": _limit()}
    report = Report({name: value for name, value in facts.items() if value})
    with tqdm(desc="checking", unit="check", leave=False) as bar:

        def note(pair: str, checks: Iterator[Check]) -> None:
            for check in _to_the_end(checks):
                report.checks.setdefault(pair, []).append(check)
                bar.update()

        note(NO_PAIR, _device_checks(places))
        reduced = bool(report.checks[NO_PAIR][0].figures.get("reduced"))
        mine = args.model is None and args.draft is None and args.adapter_path is None
        name = EMBEDDED_PAIR if mine else YOUR_PAIR
        report.facts[name.lower()] = f"target {describe(model)}; drafter {describe(drafter)}"
        # Memory comes first, before anything else was held.
        note(name, _memory_checks(model, drafter, tokenizer, before))
        if not mine:
            note(EMBEDDED_PAIR, _embedded_stages(places))
        note(name, _stage_checks(model, drafter, tokenizer, places, embedded=mine))
        note(name, _cost_checks(model, drafter, report))
        kinds = variants(args, model)
        del model, drafter
        note(name, _text_checks(kinds, reduced))
    return report


def _to_the_end(checks: Iterator[Check]) -> Iterator[Check]:
    """Checks, and what broke between two of them as one more."""
    try:
        yield from checks
    except UserError:
        raise
    except Exception as error:  # whatever a device makes of what it was handed
        yield broken("what came next", error)


def _device_checks(places: Places | None) -> Iterator[Check]:
    yield guarded("float32 products", products_check)
    for stage in fixed_stages():
        yield compare(stage, places, 0.0 if on_cpu() else 1e-6)


def _embedded_stages(places: Places | None) -> Iterator[Check]:
    model, drafter, tokenizer = load()
    assert drafter is not None
    yield from _stage_checks(model, drafter, tokenizer, places, embedded=True)


def _stage_checks(
    model: nn.Module, drafter: Drafter, tokenizer: Any, places: Places | None, embedded: bool
) -> Iterator[Check]:
    """Each stage in both places, and the self-check against plain decoding where it is used."""
    target, verifier = Target.of(model), verifier_of(model)
    yield _capability(verifier.found, embedded)
    ways = every_way(verifier.found) if embedded else [verifier.found]
    if verifier.capability == NONE:
        yield Check("stages", NOT_MADE, "this target cannot verify drafts")
        return
    if places is not None and not embedded and (seconds := reading_seconds(target, places.reference)) > PATIENCE:
        yield Check("stages", NOT_MADE, f"the CPU would take {seconds:.0f} s; see those of the embedded pair")
        return
    place = mx.default_device() if places is None else places.reference
    given = inputs(target, _encode(tokenizer, PROMPTS[0])[:16], place)
    least, most = tolerances(model, target)
    plain = compare(plain_stage(target, given), places, most, PLAIN_ADVICE)
    yield plain
    tolerance = min(most, max(least, 3 * plain.figures.get("difference", 0.0)))
    for stage in pair_stages(target, drafter, given, ways):
        yield compare(stage, places, tolerance)


def _capability(found: Capability, embedded: bool) -> Check:
    """What verification against plain decoding has shown on this device."""
    name, figures = "verification against plain decoding", dataclasses.asdict(found)
    if found.kind == TREE and not (embedded and found.split_rows):
        return Check(name, OK, "equal; any tree can be verified", "", figures)
    what = f"capability {found.kind!r}{', rows split' if found.split_rows else ''} ({found.reason})"
    if embedded:  # known to take any tree
        return Check(name, FAILED, f"{what}, expected {TREE!r}", REPORT, figures)
    return Check(name, NOTE, what, "", figures)


def _memory_checks(model: nn.Module, drafter: Drafter, tokenizer: Any, before: int) -> Iterator[Check]:
    prompt = _encode(tokenizer, PROMPTS[0])
    verifier_of(model)
    yield guarded("memory", lambda: memory_check(model, drafter, tokenizer, prompt, SHAPES[-1], before, tokens=TOKENS))


def _cost_checks(model: nn.Module, drafter: Drafter, report: Report) -> Iterator[Check]:
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        yield Check("costs of a step", NOT_MADE, "this target cannot verify drafts")
        return

    def check() -> Check:
        session = session_for(verifier, drafter)
        report.costs, report.choice = session.costs, str(session.memory.current.plan)
        return Check(
            "costs of a step", OK, f"{'measured now' if session.measured_now else 'measured before'}, see below"
        )

    yield guarded("costs of a step", check)


def _text_checks(kinds: list[Variant], reduced: bool) -> Iterator[Check]:
    """Texts of each type of weights; a pair's memory is free before the next one is loaded."""
    for variant in kinds:
        yield from _texts_of(variant, reduced)
        gc.collect()
        mx.clear_cache()


def _texts_of(variant: Variant, reduced: bool) -> Iterator[Check]:
    name = f"texts, {variant.name}"
    if variant.why_not:
        yield Check(name, NOT_MADE, variant.why_not)
        return
    model, drafter, tokenizer = variant.load()
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        yield Check(name, NOT_MADE, verifier.reason)
        return
    prompts = [_encode(tokenizer, prompt) for prompt in PROMPTS]
    write = greedy_texts(model, drafter, tokenizer)
    yield guarded(name, lambda: greedy_check(name, measure(write, model, prompts), variant.exact, reduced))
    if variant.exact:
        sampled = f"{name}, sampled"
        yield guarded(sampled, lambda: sampled_check(sampled, model, drafter, tokenizer, prompts[:2], reduced))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text))


def _limit() -> str:
    """How much of the memory the GPU should hold at most, where MLX says so."""
    most = mx.device_info().get("max_recommended_working_set_size")
    return "" if most is None else f"{int(most) / 1e9:.1f} GB"
