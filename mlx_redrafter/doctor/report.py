"""The report: short enough to paste, and the same as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, Check
from mlx_redrafter.tuning.report import cost_lines
from mlx_redrafter.tuning.step_costs import Costs


@dataclasses.dataclass
class Report:
    """Everything that was found.

    Attributes:
        facts: device, versions, the pair.
        checks: by the pair that they were made with.
        costs: of a step on this device; None where they could not be measured.
        choice: what auto would begin with.
        seconds: that all of it took.
    """

    facts: dict[str, str]
    checks: dict[str, list[Check]] = dataclasses.field(default_factory=dict)
    costs: Costs | None = None
    choice: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        return [check for _, check in self._all() if check.status == FAILED]

    def to_dict(self) -> dict[str, Any]:
        """What --json writes; times in seconds, memory in bytes."""
        return {
            "facts": self.facts,
            "checks": [{"pair": pair} | dataclasses.asdict(check) for pair, check in self._all()],
            "failed": [check.name for check in self.failed],
            "costs": None if self.costs is None else self.costs.to_dict(),
            "choice": self.choice,
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """The same for people."""
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        width = max((len(check.name) for _, check in self._all() if check.status != NOT_MADE), default=0)
        for pair, checks in self.checks.items():
            lines += ["", f"{pair}:"]
            made = [check for check in checks if check.status != NOT_MADE]
            lines += [f"  {check.status:<6}  {check.name:<{width}}  {check.detail}" for check in made]
            missing = [check for check in checks if check.status == NOT_MADE]
            for reason in dict.fromkeys(check.detail for check in missing):
                names = ", ".join(check.name for check in missing if check.detail == reason)
                lines.append(f"  not made ({reason}): {names}")
        if self.costs is not None:
            lines += ["", *cost_lines(self.costs), "", f"Choice to begin with: {self.choice}"]
        return "\n".join([*lines, "", *self._verdict()])

    def _verdict(self) -> list[str]:
        made = [check for _, check in self._all() if check.status != NOT_MADE]
        missing = len(list(self._all())) - len(made)
        if not self.failed:
            beside = f"; {missing} could not be made" if missing else ""
            return [f"All is well: {len(made)} checks in {self.seconds:.0f} s{beside}."]
        lines = [f"{len(self.failed)} of {len(made)} checks failed:"]
        return lines + [f"  {check.name}: {check.detail}; {check.advice}" for check in self.failed]

    def _all(self) -> list[tuple[str, Check]]:
        return [(pair, check) for pair, checks in self.checks.items() for check in checks]
