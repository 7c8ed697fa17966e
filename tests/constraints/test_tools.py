"""What a text with tool calls may be at each place, for tags that are tokens and for tags that are text."""

import json

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools, kimi_k3

from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.errors import UserError
from mlx_redrafter.text.loading import EMBEDDED

TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
ADD = {"type": "object", "properties": {"a": {"enum": [12]}}, "required": ["a"], "additionalProperties": False}
SCHEMAS = {"add": ADD, "adder": {"type": "object"}, 'q"': {"type": "object"}}


def wrapped(tokens=(), parser=json_tools):
    inner = load_tokenizer(EMBEDDED / "target")._tokenizer
    inner.add_tokens(list(tokens))
    tags = {"tool_call_start": parser.tool_call_start, "tool_call_end": parser.tool_call_end}
    return TokenizerWrapper(inner, **tags, tool_parser=parser.parse_tool_call)


@pytest.fixture(params=[TAGS, []], ids=["tokens", "text"])
def tokenizer(request):
    return wrapped(request.param)


def behind(tokenizer, text, forced=False, thinking=False):
    """What is forced behind a text, whether it may end there, and how many tokens may follow; None if it cannot be."""
    size = len(tokenizer._tokenizer)
    schemas = {name: one for name, one in SCHEMAS.items() if name.isalpha() or tokenizer.tool_call_start in TAGS}
    matcher = Matcher(ToolCalls(schemas, forced).constraint(tokenizer, size, thinking), tokenizer, size)
    try:
        matcher.take(tokenizer.encode(text, add_special_tokens=False))
    except UserError:
        return None
    allowed = np.nonzero(np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little"))[0]
    return tokenizer.decode(matcher.forced(99)), tokenizer.eos_token_id in allowed, len(allowed)


def test_text_is_free_until_a_call(tokenizer):
    """If this fails, a model that may call tools cannot say what it wants, or calls them with what it wants."""
    for text in (
        "",
        "Let me see. ",
        "<tool_",
        "<think>Maybe.</think>Now",
        '<tool_call>{"name": "adder", "arguments": {}}',
    ):
        text += "</tool_call>\nAnd so" if "name" in text else ""
        forced, ends, ways = behind(tokenizer, text)
        assert (forced, ends) == ("", True) and ways > 3900
    assert behind(tokenizer, "So: <tool_call>")[1:] == (False, 2)  # a line break, or the call
    call = '<tool_call>\n{"name": "add", "arguments": {'
    assert behind(tokenizer, f"x {call}") == ('"a": 12}}', False, 1)
    assert behind(tokenizer, 'x <tool_call>{"name": "adder", "arguments": {"z": [1]')[1:] != (True, 1)
    for wrong in ('{"nme', '{"name": "ad"', '{"name": "add", "arguments": {"b', '{"name": "q"'):
        assert behind(tokenizer, f"So: <tool_call>{wrong}") is None, wrong
    assert behind(tokenizer, f'x</tool_call>{call}"a": 12}}}}\n</tool_call><tool_call>1') is None


def test_a_tag_that_is_spelt_is_no_way_around():
    """If this fails, a model calls a tool with anything: the parser reads text, whichever tokens it is made of."""
    tokenizer = wrapped(TAGS)
    spelt = [token for part in ("<tool_", "call") for token in tokenizer.encode(part, add_special_tokens=False)]
    size, [last] = len(tokenizer._tokenizer), tokenizer.encode(">", add_special_tokens=False)
    matcher = Matcher(ToolCalls(SCHEMAS).constraint(tokenizer, size), tokenizer, size)
    matcher.take(spelt)
    with pytest.raises(UserError):
        matcher.take([last])


def test_a_tag_may_be_tokens_and_text():
    """If this fails, the token that a tag begins with is forbidden elsewhere, or goes around the schema."""
    tokenizer = wrapped(["<|open|>", "<|close|>", "<|sep|>"], kimi_k3)
    for text in (
        "",
        "So <|open|>response<|sep|>hm<|close|>response<|sep|>",
        "<|open|>tool<|sep|>",
        "<|sep|><|close|>a",
    ):
        assert behind(tokenizer, text)[:2] == ("", True), text
    call = '<|open|>tools<|sep|><|open|>call tool="add" index="1"<|sep|><|open|>json type="object"<|sep|>{"a": 12}'
    end = "<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
    for before in ("", "So ", "<|open|>response<|sep|>hm<|close|>response<|sep|>"):
        assert behind(tokenizer, before + call)[:2] == (end, False)
        assert behind(tokenizer, before + call + end + "So")[:2] == ("", True)
    assert behind(tokenizer, "<|open|>tools<|sep|>So") is None
    spelt = [tokenizer.encode(part, add_special_tokens=False) for part in ("<|open|>tools", "<|", "sep", "|", ">")]
    size = len(tokenizer._tokenizer)
    matcher = Matcher(ToolCalls({"add": ADD}).constraint(tokenizer, size), tokenizer, size)
    with pytest.raises(UserError):
        matcher.take([token for part in spelt for token in part])
    tokenizer._think_start, tokenizer._think_end = "<|open|>think<|sep|>", "<|close|>think<|sep|>"
    for begun, thinking in (("<|open|>think<|sep|>", False), ("", True)):
        assert behind(tokenizer, f"{begun}Hm", True, thinking)[:2] == ("", False)
        assert behind(tokenizer, f"{begun}Hm<|close|>think<|sep|>\n\n", True, thinking)[:2] == (
            call.partition("add")[0],
            False,
        )
        assert behind(tokenizer, f"{begun}Hm<|open|>tools<|sep|>", True, thinking) is None


def test_a_call_that_is_required_comes_first(tokenizer):
    """If this fails, a model ends without the call that it had to make."""
    assert behind(tokenizer, "", forced=True)[1] is False and behind(tokenizer, "Let", forced=True) is None
    assert behind(tokenizer, "<tool_call>\n", forced=True) == ('{"name": "', False, 1)
    done = '<tool_call>\n{"name": "q\\"", "arguments": {}}\n</tool_call>'
    assert behind(tokenizer, done, forced=True)[:2] == ("", True)
    assert behind(tokenizer, done[:-12], forced=True)[1] is False


def test_thoughts_come_before_a_call_that_is_required():
    """If this fails, a model that thinks cannot, or thinks without end."""
    tokenizer = wrapped(TAGS)
    for begun, thinking in (("<think>", False), ("", True)):
        assert behind(tokenizer, f"{begun}Hm", True, thinking)[:2] == ("", False)
        assert behind(tokenizer, f"{begun}Hm</think>\n\n", True, thinking) == ("<tool_call>", False, 1)
        assert behind(tokenizer, f"{begun}Hm</think>So", True, thinking) is None
    assert behind(tokenizer, "<tool_call>", True, True) is None


def test_other_formats_are_named():
    """If this fails, calls that no grammar holds are taken as though one did."""
    tokenizer = wrapped()
    for parser, name in ((json.loads, "json"), (None, "none")):
        tokenizer._tool_parser = parser
        with pytest.raises(UserError, match=f"the tool parser is {name}, expected one of json_tools, "):
            ToolCalls(SCHEMAS).constraint(tokenizer, 4096)
