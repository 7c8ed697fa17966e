"""Structured output with drafts is structured output without, and is what was asked for."""

import collections
import dataclasses
import decimal
import json
import os
import pathlib
import re

import jsonschema
import pytest
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, minimax_m2, pythonic
from support.schemas import SCHEMAS

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.constraints.constraint import json_object, json_schema, lark, regex
from mlx_redrafter.constraints.thinking import thinking_budget
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.responses import summary

# How drafts come about: with the drafter or without, a shape (None for "auto"), lookup.
WAYS = [
    (False, None, "off"), (True, DraftShape(), "off"), (True, DraftShape(4, 5, 12), "off"), (True, None, None),
    (True, DraftShape(4, 5, 7), "on"), (False, DraftShape(), "on"),
]  # fmt: skip
CHOOSERS = [position_keyed(0), position_keyed(1.0, 3, top_p=0.9), position_keyed(0.8, 5, min_p=0.02, top_k=40)]
PROMPTS = {"stories_pair": "Once upon a time", "pair": "import json\n"}
FREE = [
    regex(r"(yes|no), (Tim|Sue) (ran|sat) [0-9]{3,5}\."),
    lark('start: "The " animal " sat."\nanimal: "cat" | "dog" | /[a-z]{3,9}/'),
    json_object(),
]


def text_of(pair, name, constraint, way=None, chooser=CHOOSERS[0], **options):
    """Tokens, text and the last response; without a way, of plain decoding under masks."""
    model, drafter, tokenizer = pair
    with_drafter, shape, lookup = way or (False, None, "off")
    if way is None:
        constraint = dataclasses.replace(constraint, jump_ahead=False)
    stream = stream_generate(
        model, tokenizer, PROMPTS[name], drafter if with_drafter else None, constraint=constraint, chooser=chooser,
        shape=shape or "auto", lookup=lookup, **({"max_tokens": 64} | options),
    )  # fmt: skip
    found = list(stream)
    return [r.token for r in found], "".join(r.text for r in found), found[-1]


def check(pair, name, constraint, schema, ways, choosers, max_tokens=64):
    """The number of finished texts; all ways give the same one, and a finished one validates."""
    finished = 0
    for chooser in choosers:
        tokens, text, last = text_of(pair, name, constraint, chooser=chooser, max_tokens=max_tokens)
        assert last.method == "plain" and last.mean_acceptance_length == 1
        for way in ways:
            assert text_of(pair, name, constraint, way, chooser, max_tokens=max_tokens)[:2] == (tokens, text), (
                way,
                chooser,
            )
        if last.finish_reason == "stop":
            finished += 1
            if schema is not None:
                jsonschema.validate(json.loads(text), schema)
    return finished


@pytest.fixture(params=PROMPTS)
def named(request):
    return request.param, request.getfixturevalue(request.param)


def test_drafts_change_nothing(named):
    """If this fails, drafts change structured text, or the text is not what was asked for.

    A few schemas, each in one way each; the slow test below has all of them in all ways.
    """
    name, pair = named
    finished = 0
    for i, (title, schema) in enumerate(list(SCHEMAS.items())[26 :: 30 if name == "pair" else 8]):
        way = WAYS[i % len(WAYS)]
        finished += check(pair, name, json_schema(schema, title), schema, [way], [CHOOSERS[i % len(CHOOSERS)]])
    assert finished >= 1
    for i, constraint in enumerate(FREE[: 2 if name == "pair" else 3]):
        check(pair, name, constraint, None, [WAYS[i + 3]], [CHOOSERS[i]])


@pytest.mark.slow
def test_drafts_change_nothing_anywhere(named):
    """The full claim: 50 schemas, every way to draft, greedy and sampled."""
    name, pair = named
    finished = sum(
        check(pair, name, json_schema(schema, title), schema, WAYS, CHOOSERS, max_tokens=128)
        for title, schema in SCHEMAS.items()
    )
    assert finished >= 120


SUITE = "MLX_REDRAFTER_SCHEMA_SUITE"  # the folder of a copy of json-schema-org/JSON-Schema-Test-Suite
DRAFTS = {"draft2020-12": jsonschema.Draft202012Validator, "draft7": jsonschema.Draft7Validator}


def check_suite(pair, name, draft, max_tokens=64):
    """What became of each schema that the public suite has of a draft, and why some were refused.

    Its instances that a schema forbids are told as texts: none may be allowed.
    """
    folder, judge, counts = pathlib.Path(os.environ[SUITE]), DRAFTS[draft], collections.Counter()
    known = vocabulary(pair[2], Target.of(pair[0]).vocab_size)
    groups = [
        group for file in sorted((folder / "tests" / draft).rglob("*.json")) for group in json.loads(file.read_text())
    ]
    for i, group in enumerate(groups):
        schema = group["schema"]
        if isinstance(schema, dict):
            schema = {"$schema": judge.META_SCHEMA["$schema"]} | schema
        try:
            constraint = json_schema(schema, "it")
        except UserError as error:
            assert str(error).startswith("it") and "\n" not in str(error)
            counts["refused"] += 1
            counts[re.sub(r"(https?|urn|file):\S*", "(elsewhere)", str(error))[:80]] += 1
            continue
        for test in group["tests"]:
            tokens = known.tokenize_str(json.dumps(test["data"], ensure_ascii=False))
            matcher = LLMatcher(known, constraint.grammar, log_level=0)
            taken = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
            assert test["valid"] or not taken, (group["description"], test["data"])
        way, chooser = WAYS[i % len(WAYS)], CHOOSERS[i % len(CHOOSERS)]
        try:
            tokens, text, last = text_of(pair, name, constraint, chooser=chooser, max_tokens=max_tokens)
        except UserError as error:  # a letter that a small vocabulary has not got
            assert "no token of the model's vocabulary" in str(error)
            counts["unspelt"] += 1
            continue
        drafted = text_of(pair, name, constraint, way, chooser, max_tokens=max_tokens)
        assert drafted[:2] == (tokens, text), (group["description"], way, chooser)
        counts["finished" if last.finish_reason == "stop" else "unfinished"] += 1
        if last.finish_reason == "stop":
            judged = [json.loads(one, parse_float=decimal.Decimal) for one in (json.dumps(schema), text)]
            try:
                judge(judged[0], format_checker=judge.FORMAT_CHECKER).validate(judged[1])
            except re.error:  # an expression that Python has not got
                counts["unjudged"] += 1
    return counts


@pytest.mark.slow
@pytest.mark.skipif(SUITE not in os.environ, reason=f"{SUITE} names no copy of the JSON-Schema-Test-Suite")
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_public_schemas(stories_pair, draft):
    """If this fails, a schema is taken that cannot be kept, or drafts change what is written under it."""
    counts = check_suite(stories_pair, "stories_pair", draft)
    print(json.dumps(counts, indent=1))  # for `pytest -s`
    assert counts["finished"] > 100


def test_calls_are_the_same_with_drafts(named):
    """If this fails, drafts change what a model does with its tools, or a strict tool gets what it cannot take."""
    name, pair = named
    schemas = {title: SCHEMAS[title] for title in ("light", "sensor")}
    tools = [{"function": {"name": title, "parameters": schema}} for title, schema in schemas.items()]
    made, most = 0, 72 if name == "pair" else 160  # the smaller vocabulary spells letter by letter
    cases = [(json_tools, True, 1), (json_tools, False, 0), (pythonic, True, 0), (minimax_m2, True, 2)]
    for i, (parser, forced, chosen) in enumerate(cases[: 1 if name == "pair" else None]):
        start, end, read = parser.tool_call_start, parser.tool_call_end, parser.parse_tool_call
        tags = {"tool_call_start": start, "tool_call_end": end}
        tokenizer = TokenizerWrapper(pair[2]._tokenizer, **tags, tool_parser=read)
        constraint = ToolCalls(schemas, forced).constraint(tokenizer, Target.of(pair[0]).vocab_size)
        ways = (None, WAYS[(2 - i) % len(WAYS)])
        found = [text_of(pair, name, constraint, way, CHOOSERS[chosen], max_tokens=most)[:2] for way in ways]
        assert found[0] == found[1]
        calls = re.findall(f"{re.escape(start)}(.*?){re.escape(end)}", found[0][1], re.DOTALL)
        assert forced or not calls
        made += len(calls)
        for call in (read(inside, tools) for inside in calls):
            jsonschema.validate(call["arguments"], schemas[call["name"]])
    assert made


def test_what_is_forced_needs_no_drafter(stories_pair):
    """If this fails, jump-ahead does not jump."""
    constraint = json_schema(SCHEMAS["weather"])
    _, _, last = text_of(stories_pair, "stories_pair", constraint, WAYS[0])
    assert last.method == "grammar" and last.forced_share > 0.1 and last.mean_acceptance_length > 1.5
    # Nobody drafted, so nothing that was drafted is accepted.
    assert (last.draft_tokens, last.accepted_tokens, last.acceptance_by_position) == (0, 0, [])
    assert last.steps + last.forced_tokens == last.generation_tokens - 1
    assert f"Forced by the grammar: {last.forced_tokens} tokens" in summary(last)
    _, _, last = text_of(stories_pair, "stories_pair", constraint, WAYS[1])
    assert 0 <= last.accepted_tokens <= last.draft_tokens and last.forced_tokens > 0
    assert last.steps + last.forced_tokens + last.accepted_tokens == last.generation_tokens - 1


def test_a_thinking_budget_is_the_same_with_drafts(stories_pair):
    """If this fails, drafts change where thoughts end."""
    for chooser in CHOOSERS[:2]:
        free, _, _ = text_of(stories_pair, "stories_pair", None, WAYS[1], chooser)
        end = [token for token in range(300, 512) if token not in free][:2]
        processors = [thinking_budget(free[8:9], end, 5)]
        found = [
            text_of(stories_pair, "stories_pair", None, way, chooser, logits_processors=processors)[0]
            for way in WAYS[:4]
        ]
        assert all(one == found[0] for one in found)
        begun = found[0].index(free[8])
        assert found[0].index(end[0]) <= begun + 6 and found[0][begun + 6 : begun + 8] == end


def test_bias_and_penalties_come_first(stories_pair):
    """If this fails, a bias lifts a token over the grammar, or is lost under it."""
    from mlx_lm.sample_utils import make_logits_processors

    tokenizer = stories_pair[2]
    constraint = regex("(yes|no|maybe|6)( and (yes|no|maybe|6)){4}")
    once, six = (tokenizer.get_vocab()[token] for token in ("▁Once", "6"))
    texts = set()
    for bias in ({once: 100.0}, {once: 100.0, six: 50.0}):
        processors = make_logits_processors(bias, repetition_penalty=1.3)
        ways = [
            text_of(stories_pair, "stories_pair", constraint, way, logits_processors=processors)[1]
            for way in (None, *WAYS[:3])
        ]
        assert len(set(ways)) == 1 and "Once" not in ways[0]
        texts.add(ways[0])
    assert len(texts) == 2


def test_a_prompt_cache_goes_on(stories_pair):
    """If this fails, a conversation breaks at a structured answer."""
    from mlx_lm.models.cache import make_prompt_cache

    found = []
    for way in (None, WAYS[0], WAYS[1]):
        cache = make_prompt_cache(stories_pair[0])
        text_of(stories_pair, "stories_pair", json_schema(SCHEMAS["light"]), way, prompt_cache=cache)
        found.append(text_of(stories_pair, "stories_pair", FREE[0], way, prompt_cache=cache)[1])
    assert len(set(found)) == 1
