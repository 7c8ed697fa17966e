"""Where what was measured of a pair is kept: one JSON file for each device and kind of pair.

A file that is damaged or of another version counts as none: what it held is measured anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json, replace_file
from mlx_redrafter.system.openblas import cache_dir
from mlx_redrafter.tuning.calibration import Calibration
from mlx_redrafter.tuning.step_costs import Costs

VARIABLE = "MLX_REDRAFTER_TUNING"  # a directory to keep the files in, or "off" to keep none
VERSION = 1
MOST_DRAFTERS = 16  # of one kind whose calibrations are kept


@dataclasses.dataclass
class Kept:
    """What a file holds.

    Attributes:
        key: what the costs depend on.
        costs: of a step.
        calibrations: by the digest of a drafter's weights.
    """

    key: dict[str, Any]
    costs: Costs
    calibrations: dict[str, Calibration]


def file_for(key: dict[str, Any]) -> pathlib.Path | None:
    """The file of a key; None where nothing is to be kept."""
    wish = os.environ.get(VARIABLE, "")
    if wish == "off":
        return None
    folder = pathlib.Path(wish).expanduser() if wish else cache_dir() / "tuning"
    return folder / f"{digest(json.dumps(key, sort_keys=True).encode())}.json"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read(key: dict[str, Any]) -> Kept | None:
    """What was kept under a key; None if that is nothing that can be used."""
    if (file := file_for(key)) is None:
        return None
    try:
        fields = read_json(file)
        if fields["version"] != VERSION or fields["key"] != key:
            return None
        calibrations = {name: Calibration.from_dict(one) for name, one in fields["calibrations"].items()}
        return Kept(key, Costs.from_dict(fields["costs"]), calibrations)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(kept: Kept) -> pathlib.Path | None:
    """Keeps it, whole or not at all; a place that cannot be written is no reason to stop, and gives None."""
    if (file := file_for(kept.key)) is None:
        return None
    recent = dict(list(kept.calibrations.items())[-MOST_DRAFTERS:])
    fields = {
        "version": VERSION,
        "key": kept.key,
        "costs": kept.costs.to_dict(),
        "calibrations": {name: one.to_dict() for name, one in recent.items()},
    }
    try:
        with replace_file(file) as temporary:
            temporary.write_text(json.dumps(fields, indent=1), "utf-8")
    except (UserError, OSError):
        return None
    return file
