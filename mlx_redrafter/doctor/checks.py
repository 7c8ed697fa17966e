"""What a check found. Knows nothing of what is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlx_redrafter.errors import UserError, one_line

OK, NOTE, FAILED, NOT_MADE = "ok", "note", "FAILED", "not made"
REPORT = "please report this, with all of this text or the file of --report"


@dataclasses.dataclass
class Check:
    """One line of the report."""

    name: str
    status: str  # OK, NOTE (worth knowing, nothing is wrong), FAILED or NOT_MADE
    detail: str  # what was found, or why the check was not made
    advice: str = REPORT  # what to do about a failure; empty without one
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # what was measured, for JSON

    def __post_init__(self) -> None:
        if self.status != FAILED:
            self.advice = ""


def guarded(name: str, make: Callable[..., Check | Iterable[Check]], *given: Any) -> Iterator[Check]:
    """One or more checks; what broke in them or between two is one more, that failed. A user's mistake stays one."""
    try:
        made = make(*given)
        yield from [made] if isinstance(made, Check) else made
    except UserError:
        raise
    except Exception as error:  # whatever a device makes of what it was handed
        yield Check(name, FAILED, f"{type(error).__name__}: {one_line(error)}")
