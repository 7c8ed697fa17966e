"""Greedy decoding, plain and with drafts."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from .beam_search import beam_search
from .drafter import Drafter
from .tree import Tree, candidate_tree
from .verification import read_sequence, verify


def plain(model: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
    """One token after the other.

    Returns:
        max_tokens tokens, and the logits (max_tokens, vocab_size) each was chosen from.
    """
    tokens, rows = list(prompt), []
    for _ in range(max_tokens):
        _, logits = read_sequence(model, tokens)
        rows.append(logits[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


def accept(tree: Tree, choices: list[int]) -> list[int]:
    """The rows of the accepted path, the root first (paper, section 3.3, with equality as the test).

    Args:
        tree: the candidates; children of one node have different tokens.
        choices: the target's own token after each row.
    """
    path = [0]
    while True:
        here = path[-1]
        agreeing = [
            row for row in range(1, len(tree.tokens)) if tree.parents[row] == here and tree.tokens[row] == choices[here]
        ]
        if not agreeing:
            return path
        path.append(agreeing[0])


def speculative(
    model: LlamaForCausalLM,
    drafter: Drafter,
    prompt: list[int],
    max_tokens: int,
    width: int,
    length: int,
    num_draft_tokens: int,
    policy: str,
) -> list[list[int]]:
    """Drafts, verifies, accepts, until there are at least `max_tokens` tokens.

    Returns:
        what each step brought; the first is the one token that the prompt alone gives.
    """
    embed = model.get_input_embeddings()
    hidden, logits = read_sequence(model, prompt, drafter.layers)
    committed, context, root = list(prompt), hidden[-1], int(logits[-1].argmax())
    steps = [[root]]
    while sum(map(len, steps)) < max_tokens:
        beams = beam_search(drafter, embed, context, root, width, length)
        tree = candidate_tree(beams, root, num_draft_tokens, policy)
        hidden, logits = verify(model, committed, tree, drafter.layers)
        choices = logits.argmax(dim=-1).tolist()
        path = accept(tree, choices)
        committed += [tree.tokens[row] for row in path]
        context, root = hidden[path[-1]], choices[path[-1]]
        steps.append([choices[row] for row in path])
    return steps
