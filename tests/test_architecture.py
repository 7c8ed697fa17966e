"""The layout is a promise: layers import downwards only, without circles, in small packages of small files.

Modules without a test file of their name are tested where they are used: the parts of a verification in
target/test_verification.py and promises/, kinds and proposers in decoding/ and promises/parity/, the flags of
commands in cli/, what commands print beside their commands.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "mlx_redrafter"
AT_THE_TOP = ("convert", "benchmarks")  # folders that the wheel maps into the package
# Top to bottom; a package imports only from those below it, and everything may import errors.
LAYERS = [
    {"cli"},
    {"server"},
    {"benchmarks"},
    {"doctor"},
    {"convert"},
    {"training"},
    {"text"},
    {"tuning"},
    {"decoding"},
    {"drafting"},
    {"target"},
    {"constraints"},
    {"embedded"},
    {"gguf"},
    {"system"},
    {"errors"},
]
# What a package must not know although it lies below: it says so in its first lines.
APART = {"convert": "training", "doctor": "training"}
PUBLIC = [
    "BatchResponse", "Conversation", "DraftShape", "DrafterConfig", "GenerationResponse", "RecurrentDrafter",
    "UserError", "batch_generate", "generate", "load", "stream_generate",
]  # fmt: skip
MOST_MODULES, MOST_LINES = 12, 300


def modules() -> dict[str, pathlib.Path]:
    """Every source file by its dotted name."""
    found = {}
    for top in (PACKAGE, *AT_THE_TOP):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str, source: str, package: bool) -> set[str]:
    """Our modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: (len(name.split(".")) + package - node.level) if node.level else 0]
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names
            }
    return {module for module in found if module.split(".")[0] == PACKAGE and module != name}


def layer(module: str) -> int:
    [level] = [i for i, names in enumerate(LAYERS) if module.split(".")[1] in names]
    return level


def upward(name: str, found: set[str]) -> list[str]:
    """The imports of a module that do not go down; the package itself, which has only the public names, may."""
    if name == PACKAGE:
        return []
    same = name.split(".")[1]
    return sorted(
        f"{name} -> {other}"
        for other in found
        if other == PACKAGE or (other.split(".")[1] != same and layer(other) <= layer(name))
    )


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: imports(name, file.read_text(), file.name == "__init__.py") for name, file in MODULES.items()}


def test_imports_go_down_only():
    """If this fails, a lower layer knows of a higher one."""
    wrong = [edge for name, found in graph().items() for edge in upward(name, found)]
    assert sorted(wrong) == KNOWN


def test_an_upward_import_is_seen():
    """If this fails, the test above sees nothing."""
    for statement in ("from mlx_redrafter.text.generate import generate", "import mlx_redrafter.text.generate"):
        found = imports("mlx_redrafter.target.model", f"def later():\n    {statement}\n", package=False)
        assert upward("mlx_redrafter.target.model", found) == [
            "mlx_redrafter.target.model -> mlx_redrafter.text.generate"
        ]
    found = imports("mlx_redrafter.convert.target", "from ..benchmarks import command", package=False)
    assert upward("mlx_redrafter.convert.target", found) == [
        "mlx_redrafter.convert.target -> mlx_redrafter.benchmarks.command"
    ]


def test_no_circles():
    """If this fails, two modules cannot be understood one after the other."""
    tuple(graphlib.TopologicalSorter(graph()).static_order())


def test_what_lies_apart_stays_apart():
    """If this fails, two packages that can be read alone have to be read together."""
    parts = {name: [*name.split("."), ""][1] for name in MODULES}
    wrong = {f"{a} -> {b}" for a, found in graph().items() for b in found if APART.get(parts[a]) == parts[b]}
    assert wrong <= KNOWN_APART


def test_errors_imports_nothing():
    """If this fails, the one module that all may import brings others along."""
    assert imports(f"{PACKAGE}.errors", MODULES[f"{PACKAGE}.errors"].read_text(), package=False) == set()


def below(name: str) -> set[str]:
    """All modules that a module brings along when it is imported."""
    edges, found, todo = graph(), set(), [name]
    while todo:
        for other in edges.get(todo.pop(), set()) - found:
            found.add(other)
            todo.append(other)
    return found


def test_loading_brings_no_loop():
    """If this fails, whoever loads a model imports the decoding of it."""
    found = {name for name in below(f"{PACKAGE}.text.loading") if name.startswith(f"{PACKAGE}.decoding")}
    assert found <= KNOWN_BELOW_LOADING


def test_public_names():
    """If this fails, a program that uses the package breaks, or a name slipped in that has to be kept for ever."""
    import mlx_redrafter

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no pyproject.toml")
    assert sorted(mlx_redrafter.__all__) == PUBLIC and all(hasattr(mlx_redrafter, name) for name in PUBLIC)
    assert {  # what the folders say of themselves is what setuptools is told
        name for name, file in MODULES.items() if file.name == "__init__.py"
    } == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def nameless_tests() -> list[str]:
    """Test files that are named after no module."""
    wrong = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        room, *rest = file.relative_to(ROOT / "tests").parts
        top = ROOT / room if room in AT_THE_TOP else ROOT / PACKAGE / room
        if rest and room != "promises" and not top.joinpath(*rest[:-1], rest[-1].removeprefix("test_")).exists():
            wrong.append(f"{room}/{'/'.join(rest)}")
    return sorted(wrong)


def test_tests_mirror_the_rooms():
    """If this fails, nobody finds the tests of a module, or the module of a test."""
    assert set(nameless_tests()) <= NAMELESS


def test_packages_and_files_are_small():
    """If this fails, a package or a file holds a second idea."""
    by_folder: dict[pathlib.Path, int] = {}
    for file in MODULES.values():
        if file.name != "__init__.py":
            by_folder[file.parent] = by_folder.get(file.parent, 0) + 1
    assert (
        sorted(f"{folder.relative_to(ROOT)}: {n} modules" for folder, n in by_folder.items() if n > MOST_MODULES)
        == TOO_MANY
    )
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    long = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert sorted(name for name, lines in long.items() if lines > MOST_LINES) == TOO_LONG
    assert {file.name for file in (ROOT / PACKAGE).glob("*.py")} == {"__init__.py", "errors.py"}


@pytest.mark.parametrize("name", sorted(name for name, file in MODULES.items() if file.name == "__init__.py"))
def test_packages_say_what_they_are_for(name):
    """If this fails, a stranger cannot tell from a package's first lines what is in it."""
    words = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert words and (name == PACKAGE or "nothing of" in words or "no program" in words)


# What is still to be put right; nothing may be added.
KNOWN: list[str] = []
TOO_MANY: list[str] = []
TOO_LONG: list[str] = []
NAMELESS: set[str] = set()
KNOWN_APART: set[str] = {
    "mlx_redrafter.convert.command -> mlx_redrafter.training.drafters.text_fit",
    "mlx_redrafter.convert.command -> mlx_redrafter.training.text.data_plan",
}
KNOWN_BELOW_LOADING: set[str] = {"mlx_redrafter.decoding.sampling"}
