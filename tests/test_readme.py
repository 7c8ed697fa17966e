"""The README, the pages beside it and the workflow: commands exist, what runs in seconds runs, links lead somewhere."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest
import yaml

from mlx_redrafter.cli.main import main
from mlx_redrafter.embedded import assistant

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: pathlib.Path) -> list[str]:
    """The command lines in a page's indented blocks, each in one line."""
    text = page.read_text().replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in re.findall(r"^ {4}(mlx-redrafter .*)$", text, re.MULTILINE)]


def workflow_lines() -> list[str]:
    """What the workflow's steps type, a line each."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line.strip() for step in steps for line in step.get("run", "").splitlines()]


class Parsed(Exception):
    """Raised in place of running a command."""


IN_WORKFLOW = [line.partition(" | ")[0] for line in workflow_lines() if line.startswith("mlx-redrafter ")]
ALL = sorted({command for page in PAGES for command in commands(page)} | set(IN_WORKFLOW))


@pytest.mark.parametrize("command", ALL)
def test_commands_are_understood(command, monkeypatch, capsys):
    """If this fails, a page tells a user to type a command or a flag that is not there."""

    def parsed(*args):
        raise Parsed

    for module in ("cli.generate", "cli.chat", "cli.demo", "cli.sessions", "benchmarks.command", "training.command"):
        monkeypatch.setattr(f"mlx_redrafter.{module}.run", parsed)
    for module in ("convert.command", "cli.serve", "cli.inspect", "cli.tune", "doctor.command"):
        monkeypatch.setattr(f"mlx_redrafter.{module}.run", parsed)
    with pytest.raises(Parsed):
        main(shlex.split(command)[1:])


def test_there_are_commands():
    """If this fails, the test above has found none of them."""
    assert len(commands(ROOT / "README.md")) >= 5 and len(ALL) > 15
    assert {shlex.split(line)[1] for line in IN_WORKFLOW} == {"doctor", "tune", "bench"}


def test_the_workflow_makes_what_the_makefile_has():
    """If this fails, the first push to a host ends in a red cross."""
    made = [line.split()[1] for line in workflow_lines() if line.startswith("make ")]
    assert made == ["lint", "test"]
    for target in made:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any(f"'{assistant.REQUIREMENT}'" in line for line in workflow_lines())


@pytest.mark.parametrize("command", [c for c in commands(ROOT / "README.md") if c.split()[1] == "generate"])
def test_what_runs_in_seconds_runs(command, capsys):
    """If this fails, the first command that a newcomer types does not work."""
    places = {"MODEL": str(ROOT / "tests/data/tiny"), "DRAFTER": str(ROOT / "tests/data/tiny-drafter")}
    words = [places.get(word, word) for word in shlex.split(command)[1:]]
    assert main([*words, "-m", "8"]) == 0
    assert "Generation: 8 tokens" in capsys.readouterr().out


def test_python(capsys):
    """If this fails, the program that a newcomer copies does not work."""
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(program.replace("max_tokens=100", "max_tokens=8"), {})
    assert len(capsys.readouterr().out) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """If this fails, a reader clicks on a page that is not there."""
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_can_be_read_at_one_sitting():
    """If this fails, something belongs on one of the pages beside it."""
    words = len(re.sub(r"^ {4}.*$|^\|.*$", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE).split())
    assert words <= 900
