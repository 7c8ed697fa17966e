"""Follows one text and the drafts of its next tokens: which of them a constraint allows. Knows nothing of models.

All of this runs on the host, some microseconds a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.constraints.constraint import Constraint
from mlx_redrafter.constraints.room import with_room
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.errors import UserError, one_line


@dataclasses.dataclass
class Grown:
    """The rows of a tree under a constraint.

    Attributes:
        tokens, parents: of each row, a parent before its children, and siblings in the order they were drafted in.
        forced: rows behind which the constraint forces the token, so that no draft is put to the test there.
    """

    tokens: list[int]
    parents: list[int]
    forced: set[int]

    @property
    def drafted(self) -> list[bool]:
        """Of each row, whether it can be right or wrong; the root counts along."""
        return [True, *(parent not in self.forced for parent in self.parents[1:])]


class Matcher:
    """What a constraint allows in one text (batch size 1).

    Args:
        constraint: of the whole text.
        tokenizer: the target's.
        size: of the target's vocabulary.

    Attributes:
        jump_ahead: whether what the grammar forces is drafted.

    Raises:
        UserError: a tokenizer that grammars cannot be made for, a grammar that is too large.
    """

    def __init__(self, constraint: Constraint, tokenizer: TokenizerWrapper, size: int):
        from llguidance import LLMatcher

        self.jump_ahead = constraint.jump_ahead
        self._ends, self._read, self._ended = set(tokenizer.eos_token_ids), 0, False
        known = vocabulary(tokenizer, size)
        self._matcher = with_room(lambda: LLMatcher(known, constraint.grammar, log_level=0))
        self._check()

    def take(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the text; what follows its end does not count.

        Raises:
            UserError: the vocabulary has no token that goes on, or the grammar takes too long to follow.
        """
        for token in tokens:
            if self._ended:
                return
            self._ended = token in self._ends and self._matcher.is_accepting()
            if not self._ended and not self._matcher.try_consume_tokens([token]):
                self._check()
                raise UserError(
                    f"structured output: no token of the model's vocabulary goes on behind token {self._read}"
                )
            self._read += 1

    def forced(self, most: int) -> list[int]:
        """The tokens that have to come next, at most so many of them; a grammar that forces bytes has this one guess.

        The target may spell the same bytes with other tokens, so that these are no more than good drafts.
        """
        if not self.jump_ahead or self._ended:
            return []
        found = self._matcher.compute_ff_tokens()
        end = next((i for i, token in enumerate(found) if token in self._ends), len(found))
        return found[: min(end, most)]

    def grow(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        rows: int,
        chain: bool = False,
        right: Sequence[float] = (0.5,),
        least: Sequence[float] = (),
        known: int = 0,
    ) -> Grown:
        """A tree without what the constraint forbids, and with what it forces in the place of that and behind it.

        Args:
            tokens, parents: of each row, the root first, which was taken already, a parent before its children.
            rows: that the result may have in any case.
            chain: it has to stay a chain.
            right: how often the best draft of a depth is right, from depth 1 on.
            least: from how probable a token on, what is forced may have a row more, by rows before it.
            known: rows behind the root that are forced themselves; depths count from the last of them.
        """
        kept, above, ahead = [tokens[0]], [0], list[tuple[float, int, list[int]]]()
        seats, odds, left, needed = {0: 0}, {0: 1.0}, dict[int, float](), dict[int, int]()

        def note(row: int, depth: int) -> None:
            if row:
                parent = parents[row]
                share = 1.0 if needed.get(parent) == tokens[row] else right[max(1, min(depth - known, len(right))) - 1]
                odds[row] = odds[parent] * left.get(parent, 1.0) * share
                left[parent] = left.get(parent, 1.0) * (1 - share)  # for its later children
                kept.append(tokens[row])
                above.append(seats[parent])
                seats[row] = len(kept) - 1
            if row < known:
                needed[row] = tokens[row + 1]
            elif more := self.forced(max(rows, len(least))):
                needed[row] = more[0]
                ahead.append((odds[row], seats[row], more))

        self._walk(tokens, parents, note)
        order = sorted(ahead, key=lambda one: -one[0])
        forced = {seats[row] for row in needed}
        if chain:
            order = [one for one in order if one[1] == len(kept) - 1]
        for probable, seat, more in order:
            for token in more:
                forced.add(seat)
                there = [i for i in range(1, len(kept)) if above[i] == seat and kept[i] == token]
                if not there:
                    taken = len(kept)
                    if taken >= rows and (taken >= len(least) or probable < least[taken]):
                        break
                    kept.append(token)
                    above.append(seat)
                seat = there[0] if there else len(kept) - 1
        return Grown(kept, above, forced)

    def allowed(self, tokens: Sequence[int], parents: Sequence[int]) -> np.ndarray:
        """What may follow each row of a tree that is allowed itself.

        Returns:
            (rows, words) uint32, 32 tokens of the vocabulary in each, the lowest bit the first.
        """
        masks: dict[int, bytes] = {}

        def note(row: int, depth: int) -> None:
            masks[row] = self._matcher.compute_bitmask()

        self._walk(tokens, parents, note)
        self._check()
        return np.stack([np.frombuffer(masks[row], np.uint32) for row in range(len(tokens))])

    def _walk(self, tokens: Sequence[int], parents: Sequence[int], visit: Callable[[int, int], None]) -> None:
        """Goes through the rows that are allowed, at each as though the text had come that far."""
        below: dict[int, list[int]] = {}
        for row in range(1, len(tokens)):
            below.setdefault(parents[row], []).append(row)

        def at(row: int, depth: int) -> None:
            visit(row, depth)
            for child in below.get(row, ()):
                # A draft of the end would be a row whose own successor is of no use.
                if tokens[child] not in self._ends and self._matcher.try_consume_tokens([tokens[child]]):
                    at(child, depth + 1)
                    self._matcher.rollback(1)

        at(0, 0)

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().partition("<state>")[0]  # behind it is llguidance's own state
            words = {"NoExtensionBias": "no text fulfils it"}
            raise UserError(f"structured output: {words.get(said.strip(), one_line(ValueError(said)))}")
