"""Beam search as a list of hypotheses, every one of them a whole sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .drafter import Drafter

Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One continuation of the root.

    Attributes:
        tokens: drafted tokens, the root left out.
        log_prob: of all of them together, given the root.
        state: (hidden_size,) the recurrent state once the last token has been read.
    """

    tokens: tuple[int, ...]
    log_prob: float
    state: torch.Tensor


@torch.no_grad()
def beam_search(
    drafter: Drafter, embed: Embed, context: torch.Tensor, root: int, width: int, length: int
) -> list[list[Hypothesis]]:
    """The beams after 1, 2, ..., length - 1 drafted tokens (paper, section 3.2).

    Args:
        drafter: the head.
        embed: the target's embedding.
        context: (hidden_size,) the target's hidden state that chose the root.
        root: the token that every hypothesis continues.
        width: W beams.
        length: L tokens per beam, the root included.

    Returns:
        length - 1 lists of width hypotheses, each list with the most probable first.
    """

    def read(token: int, state: torch.Tensor | None) -> torch.Tensor:
        embedding = embed(torch.tensor(token, device=context.device))
        return drafter.advance(embedding, drafter.first_state(embedding) if state is None else state)

    beam = [Hypothesis((), 0.0, read(root, None))]
    beams = []
    for _ in range(length - 1):
        children = []
        for parent in beam:
            scores = drafter.log_probs(context, parent.state).tolist()
            children += [(parent.log_prob + score, token, parent) for token, score in enumerate(scores)]
        children.sort(key=lambda child: -child[0])
        beam = [
            Hypothesis((*parent.tokens, token), log_prob, read(token, parent.state))
            for log_prob, token, parent in children[:width]
        ]
        beams.append(beam)
    return beams
