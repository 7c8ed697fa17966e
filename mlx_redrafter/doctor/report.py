"""The report: short enough to paste, and the same as JSON.

Knows nothing of how checks are made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, Check
from mlx_redrafter.tuning.report import cost_lines
from mlx_redrafter.tuning.step_costs import Costs


@dataclasses.dataclass
class Report:
    """Everything that was found."""

    facts: dict[str, str]  # device, versions, the pair
    checks: dict[str, list[Check]] = dataclasses.field(default_factory=dict)  # by the pair that they were made with
    costs: Costs | None = None  # of a step on this device
    choice: str = ""  # what auto would begin with
    seconds: float = 0.0  # that all of it took

    @property
    def all_checks(self) -> list[Check]:
        return [check for checks in self.checks.values() for check in checks]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.all_checks if check.status == FAILED]

    def to_dict(self) -> dict[str, Any]:
        """What --report writes; times in seconds, memory in bytes."""
        return {
            "facts": self.facts,
            "checks": [{"pair": pair} | dataclasses.asdict(c) for pair, checks in self.checks.items() for c in checks],
            "failed": [check.name for check in self.failed],
            "costs": None if self.costs is None else self.costs.to_dict(),
            "choice": self.choice,
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """The same for people."""
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        made = [check for check in self.all_checks if check.status != NOT_MADE]
        width = max((len(check.name) for check in made), default=0)
        for pair, checks in self.checks.items():
            lines += ["", f"{pair}:"]
            missing: dict[str, list[str]] = {}
            for check in checks:
                if check.status == NOT_MADE:
                    missing.setdefault(check.detail, []).append(check.name)
                else:
                    lines.append(f"  {check.status:<6}  {check.name:<{width}}  {check.detail}")
            lines += [f"  not made ({reason}): {', '.join(names)}" for reason, names in missing.items()]
        if self.costs is not None:
            lines += ["", *cost_lines(self.costs), "", f"Choice to begin with: {self.choice}"]
        if self.failed:
            lines += ["", f"{len(self.failed)} of {len(made)} checks failed:"]
            lines += [f"  {check.name}: {check.detail}; {check.advice}" for check in self.failed]
        else:
            missed = len(self.all_checks) - len(made)
            beside = f"; {missed} could not be made" if missed else ""
            lines += ["", f"All is well: {len(made)} checks in {self.seconds:.0f} s{beside}."]
        return "\n".join(lines)
