"""Calls as mlx-lm's tool parsers read them, and a tokenizer to which their tags are text or tokens."""

from __future__ import annotations

import functools
import importlib
import json

from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import kimi_k3

from mlx_redrafter.constraints.tool_formats import FORMATS
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.text.loading import EMBEDDED

PARSERS = {parser: importlib.import_module(f"mlx_lm.tool_parsers.{parser}") for parser in FORMATS}
INSIDE = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>", "[ARGS]", "<escape>", '<|"|>', "<|open|>", "<|close|>", "<|sep|>"]  # fmt: skip
TAGS = {tag for module in PARSERS.values() for tag in (module.tool_call_start, module.tool_call_end) if tag}
TEXT = {"<function name=", kimi_k3.tool_call_start, kimi_k3.tool_call_end}  # tags that no tokenizer has as one token


@functools.cache
def embedded(special):
    """The embedded tokenizer, to which all tags are text, or tokens."""
    inner = load_tokenizer(EMBEDDED / "target")._tokenizer
    inner.add_tokens(sorted({*INSIDE, *TAGS} - TEXT) if special else [])
    return inner


def tokenizer_of(parser, special):
    module = PARSERS[parser]
    tags = {"tool_call_start": module.tool_call_start, "tool_call_end": module.tool_call_end}
    return TokenizerWrapper(embedded(special), **tags, tool_parser=module.parse_tool_call)


WRITTEN = {  # a call with one argument
    "json_tools": '{"name": "f", "arguments": {"a": VALUE}}',
    "longcat": '{"name": "f", "arguments": {"a": VALUE}}',
    "mistral": 'f[ARGS]{"a": VALUE}',
    "kimi_k2": '<|tool_call_begin|>functions.f:7<|tool_call_argument_begin|>{"a": VALUE}<|tool_call_end|>',
    "kimi_k3": '<|open|>call tool="f" index="1"<|sep|><|open|>json type="object"<|sep|>{"a": VALUE}'
    "<|close|>json<|sep|><|close|>call<|sep|>",
    "qwen3_coder": "\n<function=f>\n<parameter=a>\nVALUE\n</parameter>\n</function>\n",
    "glm47": "f\n<arg_key>a</arg_key>\n<arg_value>VALUE</arg_value>\n",
    "minimax_m2": '\n<invoke name="f">\n<parameter name="a">VALUE</parameter>\n</invoke>\n',
    "minicpm5": '"f"><param name="a">VALUE</param>',
    "muse_spark": '\n<atem:invoke name="f">\n<atem:parameter name="a">VALUE</atem:parameter>\n</atem:invoke>\n',
    "pythonic": "[f(a=VALUE)]",
    "function_gemma": "call:f{a:VALUE}",
    "gemma4": "call:f{a:VALUE}",
}


def called(parser, inside, name, schema):
    """The one call that a parser reads in what stands between its tags."""
    calls = PARSERS[parser].parse_tool_call(inside, [{"function": {"name": name, "parameters": schema}}])
    [call] = calls if isinstance(calls, list) else [calls]
    return call["name"], call["arguments"]


def between_tags(parser, text):
    """What a text that begins with a call has between the tags around it."""
    start, end = PARSERS[parser].tool_call_start, PARSERS[parser].tool_call_end
    inside = text.removeprefix(start)
    return inside.partition(end)[0] if end else inside


@functools.cache
def matcher_of(parser, schema):
    tokenizer, size = tokenizer_of(parser, False), len(embedded(False))
    constraint = ToolCalls({"f": json.loads(schema)}, forced=True).constraint(tokenizer, size)
    return LLMatcher(vocabulary(tokenizer, size), constraint.grammar, log_level=0)


def allows(parser, schema, text):
    """Whether a text may be that begins with a call of f, which has this schema."""
    matcher, tokens = matcher_of(parser, json.dumps(schema)), embedded(False).encode(text, add_special_tokens=False)
    matcher.reset()
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
