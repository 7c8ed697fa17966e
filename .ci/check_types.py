"""Checks the types of the package and the tests with mypy, under the module names that they are imported by.

mypy itself knows nothing of setuptools' package-dir, which maps `convert` and `benchmarks` into the package.
"""

from __future__ import annotations

import pathlib
import sys

from mypy import build, main
from mypy.errors import CompileError
from mypy.modulefinder import BuildSource

PREFIXES = {"mlx_redrafter": "", "convert": "mlx_redrafter.", "benchmarks": "mlx_redrafter.", "tests": ""}


def sources() -> list[BuildSource]:
    found = []
    for top, prefix in PREFIXES.items():
        for file in sorted(pathlib.Path(top).rglob("*.py")):
            parts = file.with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            importable = top != "tests" or parts[1].startswith(("support", "torch_reference"))
            name = ".".join(parts[1:] if top == "tests" and importable else parts)
            found.append(BuildSource(str(file), prefix + name, None, "."))
    return found


def errors() -> list[str]:
    _, options = main.process_options(["--package", "mlx_redrafter", *sys.argv[1:]])
    try:
        return build.build(sources(), options, stdout=sys.stdout, stderr=sys.stderr).errors
    except CompileError as error:
        return error.messages


if __name__ == "__main__":
    found = errors()
    print("\n".join(found) or f"Types: no errors in {len(sources())} files")
    sys.exit(bool(found))
