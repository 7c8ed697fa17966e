"""A step's tree as lines of a terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

from mlx_redrafter.decoding.trace import WatchedStep

IN_ASCII = str.maketrans({"└": "`", "├": "|", "─": "-", "│": "|", "✓": "+", "✗": "x"})
GREEN, RED, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[1m", "\033[0m"


def colours() -> bool:
    """Whether the terminal shows colours, and nobody asked for none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def drawn(text: str) -> str:
    """A text with lines and marks of ASCII where the terminal has no others."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(IN_ASCII)
    return text


def painted(text: str, colour: str, on: bool) -> str:
    return f"{colour}{text}{PLAIN}" if on else text


def token_text(tokenizer: Any, token: int) -> str:
    """What a token adds to a text. SentencePiece's drop their space where a text begins, so it is asked for two."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def word(tokenizer: Any, token: int) -> str:
    """A token as one visible word: line breaks and the like escaped, in quotes."""
    return repr(token_text(tokenizer, token))


def show(step: WatchedStep, number: int, tokenizer: Any, colour: bool) -> str:
    """One step as lines: what became of it, and the tree, a candidate a line.

    Args:
        number: of the step, from 1.
        colour: use colours beside the words and marks, which say the same.
    """
    nodes = step.nodes
    accepted = sum(node.accepted for node in nodes) - 1
    drafted = "looked up" if step.by_lookup else "drafted"
    head = f"step {number}: {accepted} of {len(nodes) - 1} {drafted} accepted"
    own = step.tokens[accepted:]
    tail = f", then the target's own {word(tokenizer, own[0])}" if own else ""
    lines = [painted(head, BOLD, colour) + tail, f"  {word(tokenizer, nodes[0].token)}"]
    children: dict[int, list[int]] = {}
    for i, node in enumerate(nodes[1:], 1):
        children.setdefault(node.parent, []).append(i)

    def below(parent: int, indent: str) -> None:
        mine = children.get(parent, [])
        for i in mine:
            last = i == mine[-1]
            node = nodes[i]
            share = "" if node.probability is None else f" {node.probability:4.0%}"
            mark = "✓ accepted" if node.accepted else "✗ rejected"
            text = painted(f"{word(tokenizer, node.token)}{share} {mark}", GREEN if node.accepted else RED, colour)
            lines.append(f"{indent}{'└─' if last else '├─'} {text}")
            below(i, indent + ("   " if last else "│  "))

    below(0, "  ")
    return drawn("\n".join(lines))
