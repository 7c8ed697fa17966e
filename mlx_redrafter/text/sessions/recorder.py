"""Records what was asked and answered, in a file of this process that only its owner may read.

Knows nothing of commands and servers.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from typing import Any

import mlx.nn as nn

from mlx_redrafter.errors import UserError
from mlx_redrafter.target.fingerprint import fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.sessions import files

logger = logging.getLogger(__name__)

# What leaves a sampler's distribution as it is, by argument: all but the temperature.
NEUTRAL = {"top_p": (0, 0.0, 1, 1.0), "min_p": (0, 0.0), "top_k": (0,), "xtc_probability": (0, 0.0)}


class Recorder:
    """Appends a line of JSON for every answer.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self) -> None:
        folder = files.folder()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--record-sessions: {folder}: cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--record-sessions: {folder}: may not be written")
        self.path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
        self._known: tuple[nn.Module, dict[str, Any]] | None = None

    def note(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        asked: list[dict[str, Any]] | str,
        answer: str,
        settings: dict[str, Any],
        ended: bool,
    ) -> None:
        """Records one answer, whole or not at all; a disk that is full costs the record, not the answer.

        Args:
            name: of the model, for people.
            asked: the messages, or the text that was continued.
            settings: how the target chose, from `settings_of`.
            ended: whether the model itself ended the answer.
        """
        if self._known is None or self._known[0] is not model:
            self._known = model, fingerprint(Target.of(model), tokenizer, name)
        said: dict[str, Any] = {"prompt": asked, "completion": answer}
        if not isinstance(asked, str):
            said = {"messages": [*asked, {"role": "assistant", "content": answer}]}
        facts = {"settings": settings, "ended": ended, "time": round(time.time()), "target": self._known[1]}
        line = json.dumps(said | facts).encode() + b"\n"
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                before, written = os.fstat(file).st_size, os.write(file, line)  # one call: lines do not mix
                if written < len(line):
                    os.ftruncate(file, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("%s: not recorded (%s)", self.path, error.strerror)


def settings_of(temp: float, changed: dict[str, Any] | None = None, **sampling: Any) -> dict[str, Any]:
    """How the target chose: the temperature, and what else of the sampler or the prompt was not as usual.

    Args:
        sampling: arguments of the sampler.
        changed: other things that change what is said or how it is written, by name; false ones are left out.
    """
    unusual = {name: value for name, value in sampling.items() if name in NEUTRAL and value not in NEUTRAL[name]}
    return {"temp": temp} | unusual | {name: value for name, value in (changed or {}).items() if value}
