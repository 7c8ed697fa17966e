"""The page of a comparison: every figure is the JSON's, nothing comes from a network, a browser shows it."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from mlx_redrafter.benchmarks.compare import Run
from mlx_redrafter.benchmarks.competitors import SETTINGS
from mlx_redrafter.benchmarks.kinds.compare_methods import HEADING, NOTES
from mlx_redrafter.benchmarks.page.page import PUBLISHED, page
from mlx_redrafter.benchmarks.page.rows import ALL, by_position, row_id, rows_of
from support.pages import traced_figures

KINDS = ["coding", "qa"]


def made_runs() -> dict[str, list[list[Run]]]:
    """Of every method a text of each kind; lookup is fastest on questions, Medusa nowhere."""
    tempo = dict(zip(SETTINGS, (8.0, 7.0, 6.5, 6.0, 6.2, 5.5, 5.8, 5.2, 4.1, 9.0, 4.0), strict=True))
    runs = {}
    for name, seconds in tempo.items():
        accepted = [] if name == "plain" else [3, 1, 0, 2]
        counted = [0] * 9 if name == "plain" else accepted
        tokens = list(range(1 + sum(counted) + len(counted)))
        texts = [Run(tokens, seconds, len(counted), 1, 0.02, counted, 5_000_000)]
        quick = dataclasses.replace(texts[0], seconds=2.0 if name == "lookup" else seconds)
        runs[name] = [[texts[0]], [quick]]
    return runs


def made_page() -> tuple[dict, str]:
    rows = []
    for temp in (0.0, 0.7):
        settings = {name: options[-1] for name, options in SETTINGS.items()}
        rows += rows_of(temp, made_runs(), KINDS, settings, dict.fromkeys(SETTINGS, 2_500_000), 50_000_000)
    nodes = [
        ("def", 0, 0, True, None),
        (" f", 0, 1, True, 0.62),
        (" g", 0, 1, False, 0.2),
        ("\n    ", 1, 2, False, 0.1),
    ]
    names = ("text", "parent", "depth", "accepted", "probability")
    data = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "search": [{"id": row_id(0, "search", "draft model 2"), "temp": 0.0, "method": "draft model", "setting": "2",
            "tokens_per_second": 91.25, "acceptance": 1.8, "best": True}],
        "tree": {"before": "x = 1\n", "own": "(", "shape": "tree of 3",
            "nodes": [{"id": f"tree/{i}", **dict(zip(names, node))} for i, node in enumerate(nodes)]},
        "published": PUBLISHED,
        "left_out": ["Medusa takes no part: <not given>."],
        "kind": "compare",
        "command": "mlx-redrafter bench compare",
        "facts": {"device": "a device", "target": "a target", "texts": "2 prompts"},
    }  # fmt: skip
    return data, page(data, HEADING, NOTES)


@pytest.fixture(scope="module")
def made():
    return made_page()


def test_every_figure_is_a_rows(made):
    """If this fails, the page says something that the JSON does not."""
    data, text = made
    assert traced_figures(text, json.loads(json.dumps(data))) > 300


def test_sentences_say_what_their_rows_say(made):
    data, text = made
    rows = {row["id"]: row for row in data["rows"]}
    sentences = re.findall(r'<li data-rows="([^"]+)">([^<]+)</li>', text)
    assert len(sentences) == 6  # two temperatures, all texts and two kinds
    for ids, sentence in sentences:
        some = [rows[name] for name in ids.split()]
        said = re.findall(r"(\d+\.\d+)x", sentence)
        assert said == [f"{row['speed_up']:.2f}" for row in some]
        kind = some[0]["category"]
        expected = "Another method wins here, prompt lookup" if kind == "qa" else "ReDrafter is fastest"
        if kind != ALL:
            assert expected in sentence


def test_the_shown_page_is_made_of_its_json():
    """If this fails, docs/compare has a page that nobody can make again."""
    folder = pathlib.Path(__file__).parents[3] / "docs" / "compare"
    made = page(json.loads((folder / "compare.json").read_text("utf-8")), HEADING, NOTES)
    shown = (folder / "compare.html").read_text("utf-8")
    # How matplotlib writes a line differs by version.
    without_charts = [re.sub(r'<svg class="chart".*?</svg>', "", text, flags=re.S) for text in (made, shown)]
    assert without_charts[0] == without_charts[1]
    assert made.count('<svg class="chart"') == shown.count('<svg class="chart"') == 2


def test_nothing_is_loaded(made):
    """If this fails, the page needs a network."""
    _, text = made
    assert not re.search(r"<script|<link[^>]+stylesheet|@import|url\((?!#)|src=", text)
    assert set(re.findall(r'<(?:link|img)[^>]+href="([^"]*)"', text)) == {"data:,"}
    assert "prefers-color-scheme: dark" in text and "&lt;not given&gt;" in text


def test_acceptance_by_position():
    runs = [Run([0] * 8, 1.0, 4, 1, 0.0, [3, 0, 1, 1]), Run([0], 0.0, 0)]
    assert by_position(runs) == [0.75, 0.25, 0.25] and by_position(runs[1:]) == []


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.mark.browser
@pytest.mark.parametrize(("name", "size", "dark"), [("light", "1100,2600", False), ("phone-dark", "500,3000", True)])
def test_a_browser_shows_it(made, tmp_path, name, size, dark):
    """A picture comes out, and the console stays empty. PAGE_PICTURES names a folder that keeps the pictures."""
    file, picture = tmp_path / "compare.html", tmp_path / f"{name}.png"
    file.write_text(made[1])
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--window-size={size}", f"--screenshot={picture}", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    ran = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", ran.stderr
    assert "CONSOLE" not in ran.stderr, ran.stderr
    if folder := os.environ.get("PAGE_PICTURES"):
        shutil.copy(picture, pathlib.Path(folder))
