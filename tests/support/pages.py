"""Reads a page of figures back, to hold them against the data behind them."""

from __future__ import annotations

import html.parser

from mlx_redrafter.benchmarks.page.page import value_of


class Figures(html.parser.HTMLParser):
    """All elements with their attributes, and the text inside <data>."""

    def __init__(self):
        super().__init__()
        self.elements, self.inside = [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        self.inside = self.elements[-1][2] if tag == "data" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.inside.append(data)


def traced_figures(text: str, data: dict) -> int:
    """Checks every figure of a page against the JSON's rows; how many there were."""
    parser, known, count = Figures(), {}, 0
    parser.feed(text)
    for some in (data["rows"], data["search"], data["published"], (data["tree"] or {"nodes": []})["nodes"]):
        known |= {row["id"]: row for row in some}
    for tag, attrs, words in parser.elements:
        assert set((attrs.get("data-rows") or "").split()) <= set(known)
        if "data-row" not in attrs:
            assert tag != "data"
            continue
        count += 1
        value = value_of(known[attrs["data-row"]], attrs["data-field"])
        assert float(attrs["value" if tag == "data" else "data-value"]) == value
        if tag == "data":
            shown = "".join(words)
            number, places = float(shown.rstrip("%")), len(shown.rstrip("%").partition(".")[2])
            scales = (100.0,) if shown.endswith("%") else (1.0, 1e-6, 1e3)
            assert any(abs(number - value * scale) <= 0.51 * 10**-places for scale in scales), (shown, value)
    return count
