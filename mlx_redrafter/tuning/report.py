"""Shows what is known of a pair: what steps cost, and what choosing makes of it.

Knows nothing of how it is printed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlx_redrafter.drafting.shape import PLAIN, Drafted, Plan
from mlx_redrafter.system.device import device_name
from mlx_redrafter.system.table import Table
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.pair_memory import Arm
from mlx_redrafter.tuning.session import Session
from mlx_redrafter.tuning.shape_controller import Controller
from mlx_redrafter.tuning.step_costs import Costs


def facts(session: Session) -> dict[str, Any]:
    """As JSON has it; times in seconds."""
    memory, costs, new_text = session.memory, session.costs, Controller(session.memory)
    context, file = min(costs.verify), store.file_for(session.key)
    return {
        "device": device_name(),
        "key": session.key,
        "file": str(file) if file is not None and file.exists() else None,
        "measured_now": session.measured_now,
        "costs": costs.to_dict(),
        "drafted_steps_seen": memory.acceptance.steps,
        "right_by_depth": memory.acceptance.shares()[0],
        "candidates": [
            {
                "shape": _fields(arm.plan),
                "seconds_per_step": memory.seconds(arm, context),
                "expected_acceptance_length": new_text.tokens(arm),
                "expected_tokens_per_second": new_text.rate(context, arm),
            }
            for arm in _best_first(new_text, context)
        ],
        "choice": _fields(new_text.plan()),
    }


def text(session: Session) -> str:
    """The same for people."""
    memory, costs, new_text = session.memory, session.costs, Controller(session.memory)
    context, longest = min(costs.verify), max(costs.verify)
    seen = memory.acceptance.steps
    known = f"from {seen} drafted steps so far" if seen else "assumed, until there are steps to go by"
    rates = " ".join(f"{share:.0%}" for share in memory.acceptance.shares()[0][:5])
    plain = 1 / costs.step_seconds(PLAIN, context)
    rows = []
    for arm in _best_first(new_text, context):
        rate, milliseconds = new_text.rate(context, arm), 1e3 * memory.seconds(arm, context)
        figures = (new_text.tokens(arm), milliseconds, rate, rate / plain)
        rows.append([str(arm.plan), *(f"{figure:.2f}" for figure in figures)])
    expected = Table("", ["expected", "tokens/step", "ms/step", "tokens/s", "speed-up"], rows)
    later, file = _best_first(new_text, longest)[0].plan, store.file_for(session.key)
    kept = f"kept in {file}" if file is not None and file.exists() else "not kept"
    return "\n".join([
        f"Device: {device_name()}", "", *cost_lines(costs), "",
        f"The drafter's best tokens right, by depth: {rates} ({known})", "", expected.text(), "",
        f"Choice to begin with: {new_text.plan()} (behind {longest} tokens: {later})",
        f"{'Measured now' if session.measured_now else 'Measured before'}; {kept}",
    ])  # fmt: skip


def cost_lines(costs: Costs) -> list[str]:
    """What steps cost, as two tables."""
    context = min(costs.verify)
    one = costs.verify_seconds(1, context)
    verified = [["plain", *(f"{1e3 * seconds:.2f}" for seconds in costs.plain.values()), ""]]
    for count, seconds in costs.verify[context].items():
        cells = (f"{1e3 * times[count]:.2f}" if count in times else "" for times in costs.verify.values())
        verified.append([str(count), *cells, f"{seconds / one:.2f}"])
    title = f"Verifying rows, ms (x: over one row, behind {context} tokens)"
    lines = [Table(title, ["rows", *(f"behind {tokens}" for tokens in costs.verify), "x"], verified).text()]
    if costs.draft:
        lengths = sorted(costs.draft[min(costs.draft)])
        drafted = [[str(w), *(f"{1e3 * costs.draft_seconds(w, n):.2f}" for n in lengths)] for w in costs.draft]
        title = "Drafting, accepting and committing, ms"
        lines += ["", Table(title, ["W", *(f"L = {length}" for length in lengths)], drafted).text()]
    return lines


def _best_first(new_text: Controller, context: int) -> list[Arm]:
    return sorted(new_text.memory.arms, key=lambda arm: -new_text.rate(context, arm))


def _fields(plan: Plan) -> dict[str, Any] | None:
    return dataclasses.asdict(plan.shape) if isinstance(plan, Drafted) else None
