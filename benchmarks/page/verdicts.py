"""Says in words what the rows of a comparison show.

Knows nothing of how they were measured, or of HTML.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_redrafter.benchmarks.charts import at
from mlx_redrafter.benchmarks.competitors import PLAIN, REDRAFTER
from mlx_redrafter.benchmarks.page.rows import Row

from mlx_redrafter.drafting.shape import AUTO
from mlx_redrafter.text.equality import Equality

CLOSE = 0.03  # differences below this share are no win


def title(method: str) -> str:
    """A method's name for people."""
    return {PLAIN: "plain mlx_lm", "draft model": "mlx_lm + draft model", "lookup": "prompt lookup"}.get(method, method)


def setting_words(setting: str) -> str:
    """A method's setting for people; empty where it has none to speak of."""
    return f"{setting} draft tokens" if setting.isdigit() else "" if setting == AUTO else setting


def named(row: Row) -> str:
    """A method and its setting in a few words."""
    words = setting_words(row.setting)
    return title(row.method) + (f" ({words})" if words else "")


def findings(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """A sentence for each temperature and kind of text: who is fastest, and who comes next of the other sort.

    Returns:
        the sentences, and the rows that each is about.
    """
    found = []
    for temp, category in dict.fromkeys((row.temp, row.category) for row in rows):
        group = [row for row in rows if (row.temp, row.category) == (temp, category)]
        found.append(_sentence(f"{at(temp).capitalize()}, {category}", group))
    return found


def _sentence(where: str, group: list[Row]) -> tuple[str, list[Row]]:
    ours = [row for row in group if row.method in REDRAFTER]
    others = [row for row in group if row.method not in REDRAFTER]
    mine = max(ours, key=lambda row: row.tokens_per_second)
    other = max(others, key=lambda row: row.tokens_per_second)
    ratio = mine.tokens_per_second / other.tokens_per_second
    figures = (
        f"{named(mine)} writes {mine.tokens_per_second:.1f} tokens/s ({mine.speed_up:.2f}x plain),"
        f" {named(other)} {other.tokens_per_second:.1f} ({other.speed_up:.2f}x)"
    )
    if abs(ratio - 1) < CLOSE:
        verdict = "Too close to call"
    elif ratio > 1:
        verdict = "ReDrafter is fastest"
    elif other.method == PLAIN:
        verdict = "Plain decoding wins here: drafting does not pay"
    else:
        verdict = f"Another method wins here, {title(other.method)}"
    return f"{where}: {verdict}. {figures}.", [mine, other]


def equality(rows: Sequence[Row]) -> str:
    """How many texts were plain mlx_lm's."""
    others = [row for row in rows if row.method != PLAIN and row.category == rows[0].category]
    found = Equality(sum(row.runs for row in others), sum(row.equal for row in others))
    if found.equal == found.texts:
        return f"All {found.texts} texts that were drafted equal plain mlx_lm's, token for token."
    differing = ", ".join(dict.fromkeys(title(row.method) for row in others if row.equal < row.runs))
    return f"{found} drafted texts equal plain mlx_lm's, token for token; others differ ({differing})."
