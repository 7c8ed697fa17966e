"""Grows a beam over a drafter and keeps everything it visited as one tree.

A beam step's W entries are W different prefixes, so the back-pointers already are the
merged tree: entry w of step k is one node, its parent the entry it grew from, and no
prefixes are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import mlx.core as mx

from mlx_redrafter.drafting.drafter_files import Embedder
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import BEAMS, BEST_FIRST
from mlx_redrafter.target.tree import CandidateTree

_NEVER = -1e30  # the key of a node that no policy keeps; finite, so that keys can be compared


@dataclasses.dataclass
class Beam:
    """Everything a beam search visited, step by step; node (k, w) has index k * W + w.

    Attributes:
        tokens: (B, L - 1, W) int32 drafted tokens.
        origins: (B, L - 1, W) int32 entry of the step before that each grew from; zeros in
            the first step, whose entries all grow from the root.
        log_probs: (B, L - 1, W) float32 cumulative log-probability from the root.
    """

    tokens: mx.array
    origins: mx.array
    log_probs: mx.array


def beam_search(
    drafter: RecurrentDrafter,
    embed: Embedder,
    projected: mx.array,
    root: mx.array,
    width: int,
    length: int,
    temperature: float = 1.0,
) -> Beam:
    """Beam search over the drafter (paper, section 3.2), as one lazy graph.

    Args:
        drafter: the head.
        embed: the target's embedding.
        projected: (B, exit_dim) what the drafter makes of the context, see `RecurrentDrafter.project_context`.
        root: (B,) int32 the token that the target has chosen and not yet read.
        width: W beams.
        length: L tokens per beam, the root included.
        temperature: that the drafter's scores are divided by (see `sampling.draft_temperature`).

    Returns:
        The L - 1 steps; within a step the entries are in order of falling log-probability.
    """
    batch, state = root.shape[0], drafter.advance(embed(root), None)

    def follow(tokens: mx.array, origins: mx.array) -> mx.array:
        nonlocal projected, state
        entries = state.shape[0] // batch
        if entries == 1 and batch > 1:
            projected = mx.repeat(projected, width, axis=0)
        rows = mx.arange(0, batch * entries, entries, dtype=mx.int32)[:, None] + origins
        state = drafter.advance(embed(tokens.reshape(-1)), state[rows.reshape(-1)])
        return drafter.logits(projected, state)

    first = drafter.logits(projected, state)
    return grow(first, follow, drafter.get("vocab_map"), batch, width, length, temperature)


def grow(
    scores: mx.array,
    follow: Callable[[mx.array, mx.array], mx.array],
    vocab_map: mx.array | None,
    batch: int,
    width: int,
    length: int,
    temperature: float = 1.0,
) -> Beam:
    """Beam search over whatever scores the next tokens; the other arguments as for `beam_search`.

    Args:
        scores: (B, scored) unnormalised, behind the root. Entries lie along the batch axis from then on,
            (B * W, ...): two axes cost MLX fewer operations than three.
        follow: takes a step's tokens (B, W) and origins (B, W), and gives the scores behind them, (B * W, scored).
        vocab_map: (scored,) the target's ids of what is scored; None where they are the same.
    """
    steps: list[tuple[mx.array, mx.array, mx.array]] = []
    for step in range(1, length):
        entries = scores.shape[0] // batch
        scores = scores.astype(mx.float32)
        if temperature != 1 and width > 1:  # a single beam takes the best token at any temperature
            scores = scores * (1 / temperature)
        base = -mx.logsumexp(scores, axis=-1).reshape(batch, entries)
        if steps:
            base = base + steps[-1][2]
        if entries == 1:
            # All scores shift by the same amount, so the choice does not wait for the normaliser.
            best, values = top(scores, width)
            origins, log_probs = mx.zeros(best.shape, mx.int32), values + base
        else:
            vocab = scores.shape[-1]
            all_scores = scores.reshape(batch, entries, vocab) + base[..., None]
            best, log_probs = top(all_scores.reshape(batch, entries * vocab), width)
            best, origins = best % vocab, best // vocab
        steps.append((best if vocab_map is None else vocab_map[best], origins, log_probs))
        if step < length - 1:
            scores = follow(steps[-1][0], origins)
    return Beam(*(mx.stack(list(parts), axis=1) for parts in zip(*steps, strict=True)))


def top(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest of each row, in falling order, without sorting all of it.

    The winners lie in the `count` blocks with the largest maxima, so only those are
    ranked. MLX's argpartition sorts the whole row on Metal.

    Args:
        scores: (B, n).
        count: at most n.

    Returns:
        indices (B, count) int32 and values (B, count).
    """
    batch, n = scores.shape
    if count == 1:
        best = mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int32)
        return best, mx.take_along_axis(scores, best, axis=-1)
    size = 1
    while size * size < n:
        size *= 2
    blocks = -(-n // size)
    if blocks <= count:
        order = mx.argsort(-scores, axis=-1)[:, :count].astype(mx.int32)
        return order, mx.take_along_axis(scores, order, axis=-1)
    if blocks * size != n:
        scores = mx.pad(scores, [(0, 0), (0, blocks * size - n)], constant_values=-mx.inf)
    table = scores.reshape(batch, blocks, size)
    leaders = mx.argsort(-mx.max(table, axis=-1), axis=-1)[:, :count].astype(mx.int32)
    # In order of index, so that equal scores keep the lower index, as in a full sort.
    leaders = mx.sort(leaders, axis=-1)
    short = mx.take_along_axis(table, leaders[..., None], axis=1).reshape(batch, count * size)
    order = mx.argsort(-short, axis=-1)[:, :count].astype(mx.int32)
    indices = mx.take_along_axis(leaders, order // size, axis=-1) * size + order % size
    return indices, mx.take_along_axis(short, order, axis=-1)


def ranks(keys: mx.array) -> mx.array:
    """Ranks a few values without sorting; ties go to the lower index.

    A comparison of all pairs, n^2 of them for the few dozen nodes of a tree, costs less
    than MLX's sort and is stable on every backend, which keeps parents before children.

    Args:
        keys: (B, n), larger is better.

    Returns:
        (B, n) int32, 0 for the best.
    """
    index = mx.arange(keys.shape[1], dtype=mx.int32)
    mine, other = keys[:, :, None], keys[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    return mx.sum(ahead.astype(mx.int32), axis=-1)


def candidate_tree(beam: Beam, root: mx.array, num_draft_tokens: int, policy: str) -> CandidateTree:
    """Chooses N nodes of a beam search for the target to check.

    `best-first` keeps the N nodes of highest cumulative log-probability, whether their
    beam survived or not. `beams` keeps nodes that final beams pass through (the paper's
    tree), those of better beams first. A parent is never less probable than its child and
    lies on at least as good a beam, so with ties going to the parent any N make a tree.

    Args:
        beam: from `beam_search`.
        root: (B,) int32.
        num_draft_tokens: N, at most W (L - 1).
        policy: "best-first" or "beams".

    Returns:
        A tree of 1 + N rows, the best nodes first; in order of depth if all nodes are kept.
        With `beams`, rows beyond the final beams' nodes are not valid.
    """
    batch, steps, width = beam.tokens.shape
    count = steps * width
    if policy == BEAMS:
        keys = _beam_keys(beam)
    else:
        keys = beam.log_probs.reshape(batch, count)
        keys = mx.where(mx.isnan(keys), _NEVER, keys)  # a broken drafter costs speed, not correctness
    if num_draft_tokens == count and policy == BEST_FIRST:
        kept = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (batch, count))
        rank = kept
    else:
        # Seats in order of rank, so parents before children, and what matters least comes last.
        rank = ranks(keys)
        seats = mx.arange(num_draft_tokens, dtype=mx.int32)[:, None]
        kept = mx.argmax(seats == rank[:, None, :], axis=-1).astype(mx.int32)
    # Rows of the tree: the root is 0, node i of the beam that was kept is 1 + rank[i].
    above = mx.arange(0, count, width, dtype=mx.int32)[:, None] - width + beam.origins
    parent_node = above.reshape(batch, count)
    parent_row = mx.where(parent_node < 0, 0, 1 + mx.take_along_axis(rank, mx.maximum(parent_node, 0), axis=-1))
    tokens = mx.take_along_axis(beam.tokens.reshape(batch, count), kept, axis=-1)
    parents = mx.take_along_axis(parent_row, kept, axis=-1)
    first = mx.zeros((batch, 1), mx.int32)
    valid = None
    if policy == BEAMS:
        on_beam = mx.take_along_axis(keys, kept, axis=-1) > _NEVER
        parents = mx.where(on_beam, parents, 0)
        valid = mx.concatenate([mx.ones((batch, 1), mx.bool_), on_beam], axis=1)
    return CandidateTree.from_parents(
        mx.concatenate([root[:, None].astype(mx.int32), tokens], axis=1),
        mx.concatenate([first, parents], axis=1),
        max_depth=min(steps, num_draft_tokens),
        valid=valid,
    )


def _beam_keys(beam: Beam) -> mx.array:
    """(B, (L - 1) W): nodes of better final beams first, shallow ones before deep ones; _NEVER off all beams."""
    batch, steps, width = beam.tokens.shape
    entry = mx.arange(width, dtype=mx.int32)
    best = mx.broadcast_to(entry, (batch, width))  # the best final beam through each entry of this step
    keys: list[mx.array] = []
    for step in reversed(range(steps)):
        keys.insert(0, mx.where(best < width, -(best * steps + step).astype(mx.float32), _NEVER))
        grew_here = beam.origins[:, step][:, None, :] == entry[:, None]
        best = mx.min(mx.where(grew_here, best[:, None, :], width), axis=-1)
    return mx.concatenate(keys, axis=1)
