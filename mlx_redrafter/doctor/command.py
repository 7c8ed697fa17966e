"""`mlx-redrafter doctor`: which checks are made of which pair, and in what order.

Knows nothing of what a check does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, NOTE, OK, Check, guarded
from mlx_redrafter.doctor.comparison import Places, compare
from mlx_redrafter.doctor.fixed_stages import fixed_stages
from mlx_redrafter.doctor.float32_precision import products_check
from mlx_redrafter.doctor.memory import active_memory, memory_check
from mlx_redrafter.doctor.pair_stages import every_way, inputs, pair_stages, plain_stage, reading_seconds, tolerances
from mlx_redrafter.doctor.report import Report
from mlx_redrafter.doctor.texts import PROMPTS, greedy_check, greedy_texts, measure, sampled_check
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
from mlx_redrafter.text.loading import EMBEDDED_PAIR, is_embedded, load
from mlx_redrafter.tuning.session import session_for
from mlx_redrafter.tuning.shape_controller import Controller

HELP = "check this program on this device; exits with 1 and lists the failed checks"
EMBEDDED, YOUR_PAIR, NO_PAIR = "Embedded pair", "Your pair", "Without a model"
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


def examine(args: argparse.Namespace) -> Report:
    """All checks: of the device, of the embedded pair, and of the user's where one is named."""
    places, before = Places.here(), active_memory()
    model, drafter, tokenizer = load_from(args)
    if drafter is None:
        raise UserError("--draft is missing: a target is checked together with its drafter")
    mine = is_embedded(args.model) and args.draft in (None, EMBEDDED_PAIR) and args.adapter_path is None
    name = EMBEDDED if mine else YOUR_PAIR
    facts = device_facts()
    if limit := mx.device_info().get("max_recommended_working_set_size"):
        facts["memory limit"] = f"{int(limit) / 1e9:.1f} GB"
    report = Report(facts | {name.lower(): f"target {describe(model)}; drafter {describe(drafter)}"})
    with tqdm(desc="checking", unit="check", leave=False) as bar:

        def note(pair: str, what: str, make: Callable[..., Check | Iterable[Check]], *given: Any) -> None:
            for check in guarded(what, make, *given):
                report.checks.setdefault(pair, []).append(check)
                bar.update()

        note(NO_PAIR, "float32 products", products_check)
        for stage in fixed_stages():
            note(NO_PAIR, stage.name, compare, stage, places, 0.0 if on_cpu() else 1e-6)
        reduced = bool(report.checks[NO_PAIR][0].figures.get("reduced"))
        # Memory comes first, before anything else was held.
        note(name, "memory", memory_check, model, drafter, tokenizer, before)
        if not mine:
            note(EMBEDDED, "stages", lambda: _stage_checks(*load(), places, True))
        note(name, "stages", _stage_checks, model, drafter, tokenizer, places, mine)
        note(name, "costs of a step", _cost_check, model, drafter, report)
        kinds = variants(args, model)
        del model, drafter
        note(name, "texts", _text_checks, kinds, reduced)
    return report


def _stage_checks(
    model: nn.Module, drafter: Drafter | None, tokenizer: Any, places: Places | None, embedded: bool
) -> Iterator[Check]:
    """Each stage in both places, and the self-check against plain decoding where it is used."""
    assert drafter is not None
    target, found = Target.of(model), verifier_of(model).found
    yield _capability(found, embedded)
    if found.kind == NONE:
        yield Check("stages", NOT_MADE, "this target cannot verify drafts")
        return
    if places is not None and not embedded and (seconds := reading_seconds(target, places.reference)) > PATIENCE:
        yield Check("stages", NOT_MADE, f"the CPU would take {seconds:.0f} s; see those of the embedded pair")
        return
    place = mx.default_device() if places is None else places.reference
    given = inputs(target, tokenizer.encode(PROMPTS[0])[:16], place, drafter.context_layers)
    least, most = tolerances(model, target)
    plain = compare(plain_stage(target, given), places, most, PLAIN_ADVICE)
    yield plain
    tolerance = min(most, max(least, 3 * plain.figures.get("difference", 0.0)))
    for stage in pair_stages(target, drafter, given, every_way(found) if embedded else [found]):
        yield compare(stage, places, tolerance)


def _capability(found: Capability, embedded: bool) -> Check:
    """What verification against plain decoding has shown on this device."""
    detail, status = "equal; any tree can be verified", OK
    if found.kind != TREE or (embedded and found.split_rows):
        detail = f"capability {found.kind!r}{', rows split' * found.split_rows} ({found.reason})"
        status = NOTE
    if embedded and status == NOTE:  # known to take any tree
        detail, status = f"{detail}, expected {TREE!r}", FAILED
    return Check("verification against plain decoding", status, detail, figures=dataclasses.asdict(found))


def _cost_check(model: nn.Module, drafter: Drafter, report: Report) -> Check:
    name, verifier = "costs of a step", verifier_of(model)
    if verifier.capability == NONE:
        return Check(name, NOT_MADE, "this target cannot verify drafts")
    session = session_for(verifier, drafter)
    report.costs, report.choice = session.costs, str(Controller(session.memory).plan())
    return Check(name, OK, f"{'measured now' if session.measured_now else 'measured before'}, see below")


def _text_checks(kinds: list[Variant], reduced: bool) -> Iterator[Check]:
    """Texts of each type of weights; a pair's memory is free before the next one is loaded."""
    for variant in kinds:
        name = f"texts, {variant.name}"
        yield from guarded(name, _texts_of, variant, name, reduced)
        gc.collect()
        mx.clear_cache()


def _texts_of(variant: Variant, name: str, reduced: bool) -> Iterator[Check]:
    if variant.why_not:
        yield Check(name, NOT_MADE, variant.why_not)
        return
    model, drafter, tokenizer = variant.load()
    if verifier_of(model).capability == NONE:
        yield Check(name, NOT_MADE, verifier_of(model).reason)
        return
    prompts, write = [tokenizer.encode(prompt) for prompt in PROMPTS], greedy_texts(model, drafter, tokenizer)
    yield from guarded(name, lambda: greedy_check(name, measure(write, model, prompts), variant.exact, reduced))
    if variant.exact:
        sampled = f"{name}, sampled"
        yield from guarded(sampled, sampled_check, sampled, model, drafter, tokenizer, prompts[:2], reduced)
