"""Which rows of a tree stay, which are added, and what may follow each."""

import numpy as np
import pytest

from mlx_redrafter.constraints.constraint import json_schema, lark, regex
from mlx_redrafter.constraints.matcher import Grown, Matcher
from mlx_redrafter.errors import UserError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def tokenizer(pair):
    return pair[2]


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def told(tokenizer, matcher, tokens=(0,), parents=(0,)):
    bits = np.unpackbits(matcher.allowed(tokens, parents).view(np.uint8), axis=1, bitorder="little")
    return [{tokenizer.decode([i]) for i in np.nonzero(row)[0]} for row in bits]


def test_what_is_forced_and_what_is_not(tokenizer):
    """If this fails, jump-ahead drafts what need not come, or misses what has to."""
    matcher = Matcher(json_schema(SCHEMA), tokenizer, 4096)
    assert tokenizer.decode(matcher.forced(99)).startswith('{"name":') and len(matcher.forced(2)) == 2
    matcher.take(ids(tokenizer, '{"name": "a'))
    assert matcher.forced(99) == [] and len(told(tokenizer, matcher)[0]) > 1000
    matcher.take(ids(tokenizer, 'b"'))
    assert tokenizer.decode(matcher.forced(99)) == "}"


def test_forbidden_rows_go_and_forced_ones_come(tokenizer):
    """If this fails, a step verifies drafts that cannot be, or leaves out those that must be."""
    matcher = Matcher(regex("a#(c|d)#"), tokenizer, 4096)
    a, b, c, d = (ids(tokenizer, letter)[0] for letter in "a#cd")
    matcher.take([a])
    # root a: (#: (c, #), c)
    grown = matcher.grow([a, b, c, c, b], [0, 0, 0, 1, 1], 5)
    # c behind a and # behind # go; # behind c is forced. Of # behind a, too, nobody can be wrong.
    assert grown == Grown([a, b, c, b], [0, 0, 1, 2], {0, 2}) and sum(grown.drafted) == 2
    assert matcher.grow([a, b, d], [0, 0, 1], 3) == Grown([a, b, d], [0, 0, 1], {0, 2})  # no row is left
    assert matcher.grow([a], [0], 9) == Grown([a, b], [0, 0], {0})
    assert matcher.grow([a, c], [0, 0], 4, chain=True) == Grown([a, b], [0, 0], {0})
    letters = told(tokenizer, matcher, [a, b, c], [0, 0, 1])
    assert [{letter for letter in row if len(letter) == 1} for row in letters] == [{"#"}, {"c", "d"}, {"#"}]
    assert told(tokenizer, matcher) == letters[:1]  # and the walk has left nothing behind


def test_the_end(tokenizer):
    """If this fails, a text ends too early, or goes on behind its end."""
    [end] = tokenizer.eos_token_ids
    matcher = Matcher(regex("(yes)+"), tokenizer, 4096)
    assert end not in np.nonzero(np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little"))[0]
    matcher.take(ids(tokenizer, "yes"))
    assert end in np.nonzero(np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little"))[0]
    assert matcher.grow([5, end], [0, 0], 2) == Grown([5], [0], set())
    matcher.take([end, 5, 6])
    assert matcher.forced(9) == []


def test_a_vocabulary_without_the_letter(stories_pair):
    """If this fails, a text that cannot go on ends in a traceback, or in what the grammar forbids."""
    matcher = Matcher(regex("a\u4e2d"), stories_pair[2], 512)
    matcher.take([stories_pair[2].get_vocab()["a"]])
    with pytest.raises(UserError, match="no token of the model's vocabulary"):
        matcher.take([0])


@pytest.mark.parametrize(
    "grammar",
    [
        lark('start: start "a"'),
        lark("start: b\nb: start"),
        lark('start: "a" start'),
        lark('start: "a"{100000000}'),
        lark("start: A\nA: /.*a.{12}/ & /.*b.{13}/ & /.*c.{14}/"),
        regex("a?" * 500 + "a" * 500),
    ],
)
def test_what_goes_on_for_ever_is_given_up(tokenizer, grammar):
    """If this fails, a grammar that nothing finite fulfils, or whose automaton explodes, holds a server up."""
    with pytest.raises(UserError, match="structured output: ") as refused:
        matcher = Matcher(grammar, tokenizer, 4096)
        for _ in range(50):
            bits = np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little")
            matcher.take(matcher.forced(9) or np.nonzero(bits)[0][:1].tolist())
    assert "\n" not in str(refused.value)


def test_left_recursion(tokenizer):
    """If this fails, a list that is written from its end is taken for endless."""
    matcher = Matcher(lark('start: start "a" | "b"'), tokenizer, 4096)
    matcher.take(ids(tokenizer, "baa"))
    assert "a" in told(tokenizer, matcher)[0] and "b" not in told(tokenizer, matcher)[0]


def test_references_may_be_deep(tokenizer):
    """If this fails, a schema that refers to itself again and again ends the process, and the server with it."""
    inner = {f"n{i}": {"items": {"$ref": f"#/$defs/n{i + 1}"}} for i in range(30)}
    for name in inner:
        for _ in range(50):
            inner[name] = {"items": inner[name]}
    constraint = json_schema({"$defs": inner | {"n30": {"type": "null"}}, "$ref": "#/$defs/n0"})
    matcher = Matcher(constraint, tokenizer, 4096)
    matcher.take(ids(tokenizer, "["))
    assert "[" in told(tokenizer, matcher)[0]
