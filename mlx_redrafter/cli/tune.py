"""`mlx-redrafter tune`: what steps cost on this device, and what decoding with --beam-width auto makes of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_name
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.flags import add_pair_arguments, load_from
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.session import Tuning, tuning_for
from mlx_redrafter.tuning.step_costs import Costs

HELP = "measure what steps cost here, and show what is drafted because of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add = parser.add_argument
    add("--fresh", action="store_true", help="measure anew, and forget what was learnt of the drafter")
    add("--json", action="store_true", help="print one JSON object, and nothing else")


def run(args: argparse.Namespace) -> None:
    model, drafter, _ = load_from(args)
    if drafter is None:
        raise UserError("--draft is missing: without a drafter there is nothing to choose")
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        raise UserError(f"this target cannot verify drafts: {verifier.reason}")
    tuning = tuning_for(verifier, drafter, fresh=args.fresh)
    facts = report(tuning)
    print(json.dumps(facts) if args.json else text(tuning, facts))


def report(tuning: Tuning) -> dict[str, Any]:
    """What `--json` prints; times in seconds."""
    memory, costs = tuning.memory, tuning.kept.costs
    context = min(costs.verify)
    candidates = sorted(memory.shapes, key=lambda shape: -memory.rate(shape, context))
    file = store.file_for(tuning.kept.key)
    return {
        "device": device_name(),
        "key": tuning.kept.key,
        "file": str(file) if file is not None and file.exists() else None,
        "measured_now": tuning.fresh,
        "costs": costs.to_dict(),
        "drafted_steps_seen": memory.calibration.steps,
        "right_by_depth": memory.calibration.first(),
        "candidates": [
            {
                "shape": _fields(shape),
                "seconds_per_step": memory.seconds(shape, context),
                "expected_acceptance_length": memory.tokens(shape),
                "expected_tokens_per_second": memory.rate(shape, context),
            }
            for shape in candidates
        ],
        "choice": _fields(memory.current),
    }


def text(tuning: Tuning, facts: dict[str, Any]) -> str:
    """The same for people."""
    costs, memory = tuning.kept.costs, tuning.memory
    context, longest = min(costs.verify), max(costs.verify)
    lines = [f"Device: {facts['device']}", "", *cost_lines(costs)]
    seen = facts["drafted_steps_seen"]
    known = f"from {seen} drafted steps so far" if seen else "assumed, until there are steps to go by"
    rates = " ".join(f"{share:.0%}" for share in facts["right_by_depth"][:5])
    lines += ["", f"The drafter's best tokens right, by depth: {rates} ({known})", ""]
    lines.append(f"{'expected':24}{'tokens/step':>13}{'ms/step':>10}{'tokens/s':>10}{'speed-up':>10}")
    plain = memory.rate(None, context)
    for shape in sorted(memory.shapes, key=lambda shape: -memory.rate(shape, context)):
        rate = memory.rate(shape, context)
        lines.append(
            f"{'plain' if shape is None else str(shape):24}{memory.tokens(shape):13.2f}"
            f"{1e3 * memory.seconds(shape, context):10.2f}{rate:10.1f}{rate / plain:9.2f}x"
        )
    choice = "plain decoding" if memory.current is None else str(memory.current)
    lines += ["", f"Choice to begin with: {choice} (behind {longest} tokens: {_choice_behind(tuning, longest)})"]
    kept = f"{'Measured now' if facts['measured_now'] else 'Measured before'}; "
    lines.append(kept + (f"kept in {facts['file']}" if facts["file"] else "not kept"))
    return "\n".join(lines)


def cost_lines(costs: Costs) -> list[str]:
    """What steps cost, as two tables."""
    context = min(costs.verify)
    lines = [f"Verifying rows, ms (x: over one row, behind {context} tokens)"]
    heads = [f"behind {tokens}" for tokens in costs.verify]
    lines.append(f"{'rows':>6}" + "".join(f"{head:>14}" for head in heads) + f"{'x':>8}")
    lines.append(f"{'plain':>6}" + "".join(f"{1e3 * costs.step_seconds(None, c):14.2f}" for c in costs.verify))
    one = costs.verify_seconds(1, context)
    for rows, seconds in costs.verify[context].items():
        cells = [f"{1e3 * times[rows]:.2f}" if rows in times else "" for times in costs.verify.values()]
        lines.append(f"{rows:>6}" + "".join(f"{cell:>14}" for cell in cells) + f"{seconds / one:8.2f}")
    lines += ["", "Drafting, accepting and committing, ms"]
    lengths = sorted(next(iter(costs.draft.values())))
    lines.append(f"{'W':>6}" + "".join(f"{f'L = {length}':>14}" for length in lengths))
    for width in costs.draft:
        cells = [f"{1e3 * costs.draft_seconds(width, length):.2f}" for length in lengths]
        lines.append(f"{width:>6}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def _choice_behind(tuning: Tuning, context: int) -> str:
    best = max(tuning.memory.shapes, key=lambda shape: tuning.memory.rate(shape, context))
    return "plain decoding" if best is None else str(best)


def _fields(shape: DraftShape | None) -> dict[str, Any] | None:
    return None if shape is None else dataclasses.asdict(shape)
