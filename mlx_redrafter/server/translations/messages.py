"""Anthropic's messages as chat completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from mlx_redrafter.server.http.figures import OURS
from mlx_redrafter.server.translations.events import Event, text_of

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "none": "none", "any": "required"}
SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "draft_model", "num_draft_tokens", "seed")


class Messages:
    """One request.

    Args:
        body: checked against the description.
    """

    def __init__(self, body: dict[str, Any]):
        self._body = body
        self._thinks = body.get("thinking", {}).get("type") == "enabled"
        self._id = f"msg_{uuid.uuid4().hex}"
        self._open: str | None = None  # the kind of the block that is open
        self._index = -1
        self._last: dict[str, Any] = {}
        self._choice: dict[str, Any] = {"finish_reason": "stop"}

    def chat(self) -> dict[str, Any]:
        body = self._body
        chat = {name: body[name] for name in SAME if name in body}
        chat["messages"] = [message for given in body["messages"] for message in _messages(given)]
        if system := text_of(body.get("system")):
            chat["messages"].insert(0, {"role": "system", "content": system})
        if "stop_sequences" in body:
            chat["stop"] = body["stop_sequences"]
        if "tools" in body:
            chat["tools"] = [_tool(tool) for tool in body["tools"]]
        choice = body.get("tool_choice", {"type": "auto"})
        chat["tool_choice"] = CHOICES.get(choice["type"]) or {"type": "function", "function": {"name": choice["name"]}}
        if "thinking" in body:
            chat["chat_template_kwargs"] = {"enable_thinking": self._thinks}
            chat["thinking_budget"] = body["thinking"].get("budget_tokens") if self._thinks else None
        return chat | {"stream_options": {"include_usage": True}}

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        [choice] = completion["choices"]
        message, content = choice["message"], list[dict[str, Any]]()
        if self._thinks and message.get("reasoning"):
            content.append({"type": "thinking", "thinking": message["reasoning"], "signature": ""})
        if message.get("content"):
            content.append({"type": "text", "text": message["content"]})
        content += [_use(call) | {"input": _arguments(call)} for call in message.get("tool_calls", [])]
        return self._message(completion, content) | self._ending(completion, choice)

    def _message(self, completion: dict[str, Any], content: list[dict[str, Any]]) -> dict[str, Any]:
        same = {"id": self._id, "type": "message", "role": "assistant", "model": completion["model"]}
        return same | {"content": content, "stop_reason": None, "stop_sequence": None, "usage": _usage({})}

    def _ending(self, completion: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        """Why it ended, and its figures."""
        sequence, reason = choice.get("stop_reason"), choice["finish_reason"]
        ended = "stop_sequence" if sequence is not None and reason == "stop" else REASONS[reason]
        found = {"stop_reason": ended, "stop_sequence": sequence, "usage": _usage(completion.get("usage", {}))}
        return found | ({"timings": completion["timings"]} if "timings" in completion else {})

    def piece(self, chunk: dict[str, Any]) -> Iterator[Event]:
        if not self._last:
            yield _event("message_start", message=self._message(chunk, []))
        self._last |= chunk
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if self._thinks and delta.get("reasoning"):
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": delta["reasoning"]})
            if delta.get("content"):
                yield from self._begin("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls", []):
                yield from self._stop()
                yield from self._begin("tool_use", _use(call) | {"input": {}})
                yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})
            self._choice = choice

    def end(self) -> Iterator[Event]:
        yield from self._stop()
        ending = self._ending(self._last, self._choice)
        usage, timings = ending.pop("usage"), {"timings": ending.pop("timings")} if "timings" in ending else {}
        yield _event("message_delta", delta=ending, usage=usage, **timings)
        yield _event("message_stop")

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[Event]:
        """Opens a block, unless one of its kind is open."""
        if self._open != kind:
            yield from self._stop()
            self._open, self._index = kind, self._index + 1
            yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _stop(self) -> Iterator[Event]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._index)
        self._open = None


def _event(name: str, **fields: Any) -> Event:
    return name, {"type": name, **fields}


def _messages(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages that one becomes: results of tools are messages of their own."""
    content = given["content"]
    if isinstance(content, str):
        yield {"role": given["role"], "content": content}
        return
    for block in content:
        if block["type"] == "tool_result":
            yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text_of(block.get("content"))}
    parts = [_part(block) for block in content if block["type"] in ("text", "image")]
    calls = [_call(block) for block in content if block["type"] == "tool_use"]
    if parts or calls:
        yield {"role": given["role"], "content": parts} | ({"tool_calls": calls} if calls else {})


def _part(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block["source"]
    return {"type": "image_url", "image_url": {"url": f"data:{source['media_type']};base64,{source['data']}"}}


def _call(block: dict[str, Any]) -> dict[str, Any]:
    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
    return {"id": block["id"], "type": "function", "function": function}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    function["strict"] = tool.get("strict")
    return {"type": "function", "function": function}


def _use(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(call["function"]["arguments"])
    return found if isinstance(found, dict) else {"arguments": found}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Anthropic counts cached tokens apart; drafts are as in chat completions."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    found = {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }
    return found | {name: usage[name] for name in OURS if name in usage}
