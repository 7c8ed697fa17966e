"""The text that the embedded target was trained on: the running Python's standard library.

It is on every machine that has Python, so training and held-out text need no download.
One file in twenty, by hash of its path, is held out of all training.
"""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator

LINES, SKIP = 12, 10  # of a prefix, and above it: comments and licences


def stdlib_files() -> Iterator[tuple[str, str, bool, bool]]:
    """Yields (path, text, held_out, is_test) for each source file of the standard library."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root).as_posix()
        if "site-packages" in rel or "dist-packages" in rel or "bad_" in path.name or "lib2to3/tests" in rel:
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        held_out = int(hashlib.sha256(rel.encode()).hexdigest(), 16) % 20 == 0
        is_test = any(part in ("test", "tests", "idle_test") for part in rel.split("/"))
        yield rel, text, held_out, is_test


def held_out_prefixes(count: int) -> list[str]:
    """Beginnings for the embedded target to continue, from files it never saw.

    Args:
        count: how many; fewer come back where the installation has fewer held-out files.

    Returns:
        One prefix per file, files spread evenly over the library.
    """
    texts = [t for _, t, held_out, is_test in stdlib_files() if held_out and not is_test]
    prefixes = ["\n".join(t.split("\n")[SKIP : SKIP + LINES]) for t in texts if t.count("\n") > 2 * (SKIP + LINES)]
    step = max(1, len(prefixes) // max(1, count))
    return prefixes[::step][:count]
