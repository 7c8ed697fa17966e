"""What a check found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mlx_redrafter.errors import UserError, one_line

OK, NOTE, FAILED, NOT_MADE = "ok", "note", "FAILED", "not made"
REPORT = "please report this, with all of this text or the file of --json"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        status: OK, NOTE (worth knowing, nothing is wrong), FAILED or NOT_MADE.
        detail: what was found, or why the check was not made.
        advice: what to do about a failure; empty otherwise.
        figures: what was measured, for JSON.
    """

    name: str
    status: str
    detail: str
    advice: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def guarded(name: str, make: Callable[[], Check]) -> Check:
    """A check; one that cannot even run has failed. A user's mistake stays one."""
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # whatever a device makes of what it was handed
        return broken(name, error)


def broken(name: str, error: Exception) -> Check:
    """The failure of a check that an error ended."""
    return Check(name, FAILED, f"{type(error).__name__}: {one_line(error)}", REPORT)
