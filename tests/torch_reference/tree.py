"""The candidate tree, by comparing prefixes: two hypotheses share a node where they share all tokens up to it."""

from __future__ import annotations

import dataclasses

from .beam_search import Hypothesis

Path = tuple[int, ...]  # tokens from below the root down to a node; the root is ()


@dataclasses.dataclass
class Tree:
    """Rows in order of depth, and within a depth the most probable first; row 0 is the root.

    Attributes:
        tokens: token of each row.
        parents: row of each row's parent; the root is its own.
        depths: distance from the root.
        ancestors: ancestors[i][j] says whether j lies on the path from the root to i, i included.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    ancestors: list[list[bool]]


def candidate_tree(beams: list[list[Hypothesis]], root: int, num_draft_tokens: int, policy: str) -> Tree:
    """The tree of at most `num_draft_tokens` nodes.

    Args:
        beams: all that a beam search visited, step by step.
        root: the token that they continue.
        num_draft_tokens: N, the root not counted.
        policy: "best-first" takes the most probable of all visited nodes, those of beams
            that did not survive too; "beams" takes the nodes of the final beams, all of the
            best beam's before any other of the next one's, and shallow before deep.
    """
    log_probs = {hypothesis.tokens: hypothesis.log_prob for beam in beams for hypothesis in beam}
    if policy == "best-first":
        # A certain token makes parent and child equally probable: the parent goes first.
        kept = sorted(log_probs, key=lambda path: (-log_probs[path], len(path)))
    elif policy == "beams":
        finals = [hypothesis.tokens for hypothesis in beams[-1]]
        prefixes = [tokens[:depth] for tokens in finals for depth in range(1, len(tokens) + 1)]
        kept = list(dict.fromkeys(prefixes))  # each once, in the order of first appearance
    else:
        raise ValueError(policy)
    kept = kept[:num_draft_tokens]
    return from_paths(root, sorted(kept, key=lambda path: (len(path), -log_probs[path])))


def from_paths(root: int, nodes: list[Path]) -> Tree:
    """A tree with a row for the root and one for each path; every prefix of a path is among them."""
    paths = [(), *nodes]
    row = {path: index for index, path in enumerate(paths)}
    return Tree(
        tokens=[path[-1] if path else root for path in paths],
        parents=[row[path[:-1]] for path in paths],
        depths=[len(path) for path in paths],
        ancestors=[[path[: len(other)] == other for other in paths] for path in paths],
    )
