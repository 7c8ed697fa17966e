"""Writes the grammar of a text with tool calls in it: anything, a tag, arguments that the tool's schema allows.

Knows nothing of requests, nor of how a call is written between its tags.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.constraints.constraint import Constraint, lark
from mlx_redrafter.constraints.tool_formats import FORMATS, STOPS
from mlx_redrafter.constraints.tool_values import Rules
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.errors import UserError


@dataclasses.dataclass(frozen=True)
class ToolCalls:
    """Which calls a text may make.

    Args:
        schemas: of each tool's arguments, by the tool's name.
        forced: the text begins with a call, behind its thoughts where it has some; else it need not make any.
    """

    schemas: dict[str, dict[str, Any]]
    forced: bool = False

    def constraint(self, tokenizer: TokenizerWrapper, size: int, thinking: bool = False) -> Constraint:
        """The constraint of a whole text.

        Args:
            tokenizer: the target's.
            size: of the target's vocabulary.
            thinking: the prompt has begun a thought.

        Raises:
            UserError: the model's calls are of another format, or a grammar cannot be made for its tokenizer.
        """
        parser = tokenizer.tool_parser
        name = "none" if parser is None else parser.__module__.rpartition(".")[2]
        if name not in FORMATS:
            raise UserError(f"tools: the tool parser is {name}, expected one of {', '.join(FORMATS)} to keep a schema")
        return lark(self._grammar(name, tokenizer, size, thinking), "tools")

    def _grammar(self, parser: str, tokenizer: TokenizerWrapper, size: int, thinking: bool) -> str:
        known, ends = vocabulary(tokenizer, size), tokenizer.eos_token_ids
        special = {
            text: token
            for text, token in tokenizer.get_added_vocab().items()
            if token < size and token not in ends and known.is_special_token(token)
        }

        def piece(text: str) -> str:
            return f"<[{special[text]}]>" if text in special else json.dumps(text)

        def parts_of(text: str) -> list[str]:
            parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
            return [part for part in parts if part]

        def spell(text: str) -> str:
            return " ".join(map(piece, parts_of(text))) or '""'

        start, think, thought = tokenizer.tool_call_start, tokenizer.think_start, tokenizer.think_end
        head, *name = parts if (parts := parts_of(start))[0] in special else [start]  # <|open|>, and tools<|sep|>

        def free(*without: str) -> str:
            """Text and special tokens, but no tag of calls, and none of the tokens that these tags begin with."""
            heads = {parts_of(tag)[0] for tag in without}
            others = ",".join(str(token) for text, token in special.items() if text not in heads)
            begun = f" | FREE {piece(head)} OTHER <[{others}]>" if name else ""
            return f"(FREE <[{others}]>{begun})*" if others else '""'

        opening = spell(start)
        if think and thought and {parts_of(think)[0], parts_of(thought)[0]} <= special.keys():
            thoughts = rf"{free(start, think, thought)} FREE {spell(thought)} /\s{{0,2}}/"
            opening = f"{thoughts} {opening}" if thinking else f"({spell(think)} {thoughts})? {opening}"
        end, stops = tokenizer.tool_call_end, STOPS.get(parser, ())
        if end and not any(stop in end for stop in stops):
            stops = (*stops, end)
        rules = Rules(parser, spell, stops)
        tools = [rules.rule(FORMATS[parser](rules, name, schema)) for name, schema in self.schemas.items()]
        calls = f"{'opening call' if self.forced else ''} (tag call)* {free(start)} FREE"
        if not end:  # a call goes on to the end of the text
            begun = "opening" if self.forced else "tag"
            calls = f"{begun} call ({spell(start)} call)*" + ("" if self.forced else f" | {free(start)} FREE")
        return "\n".join((
            f"start: {calls}",
            f"opening: {opening}",
            f"tag: {free(start)} " + (f"FREE {spell(start)}" if head in special else "last"),
            f"last[lazy]: ANY {json.dumps(start)}",
            f"call: ({' | '.join(tools)}) {spell(end)}",
            *rules.lines,
            f"FREE: ANY & ~(ANY {json.dumps(head)} ANY)",
            *([f"OTHER: FREE & ~({json.dumps(name[0])} | {json.dumps(''.join(name))} ANY)"] if name else []),
            "ANY: /(?s:.*)/",
        ))  # fmt: skip
