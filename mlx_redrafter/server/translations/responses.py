"""OpenAI's responses as chat completions; nothing is kept from one to the next."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from mlx_redrafter.server.http.figures import OURS
from mlx_redrafter.server.translations.events import Event, text_of

SAME = ("model", "temperature", "top_p", "stream", "top_logprobs", "draft_model", "num_draft_tokens", "seed", "stop")
ECHOED: dict[str, Any] = {
    "instructions": None,
    "metadata": {},
    "temperature": None,
    "top_p": None,
    "max_output_tokens": None,
}
ECHOED |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "text": {"format": {"type": "text"}}}
ROLES = {"developer": "system"}


class Responses:
    """One request.

    Args:
        body: checked against the description.
    """

    def __init__(self, body: dict[str, Any]):
        self._body = body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item is a message that goes on
        self._last: dict[str, Any] = {}
        self._length = False  # whether it ended for its length
        self._events = 0

    def chat(self) -> dict[str, Any]:
        body = self._body
        chat = {name: body[name] for name in SAME if name in body}
        given = body["input"]
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        chat["messages"] = _messages(items)
        if body.get("instructions"):
            chat["messages"].insert(0, {"role": "system", "content": body["instructions"]})
        if "max_output_tokens" in body:
            chat["max_tokens"] = body["max_output_tokens"]
        if body.get("tools"):
            chat["tools"] = [
                {"type": "function", "function": {k: tool[k] for k in tool if k != "type"}} for tool in body["tools"]
            ]
        if isinstance(choice := body.get("tool_choice"), dict):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        chat["tool_choice"] = choice
        if form := (body.get("text") or {}).get("format"):
            chat["response_format"] = {"type": form["type"], "json_schema": {"schema": form.get("schema", {})}}
        return chat | {"stream_options": {"include_usage": True}}

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        [choice] = completion["choices"]
        for _ in self.piece(completion | {"choices": [choice | {"delta": choice["message"]}]}):
            pass
        for _ in self._stop():
            pass
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self._length else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        echoed = {name: self._body.get(name, usual) for name, usual in ECHOED.items()}
        found = {"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None}
        found |= {"incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None}
        found |= {"model": self._last.get("model"), "output": self._output, "usage": _usage(self._last.get("usage"))}
        return found | echoed | ({"timings": self._last["timings"]} if "timings" in self._last else {})

    def piece(self, chunk: dict[str, Any]) -> Iterator[Event]:
        first = not self._last
        self._last |= chunk
        if first:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield from self._begin()
                self._output[-1]["content"][0]["text"] += text
                yield self._part_event("response.output_text.delta", delta=text, logprobs=[])
            for call in choice["delta"].get("tool_calls", []):
                yield from self._stop()
                yield from self._call(call)
            self._length = self._length or choice["finish_reason"] == "length"

    def end(self) -> Iterator[Event]:
        yield from self._stop()
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _begin(self) -> Iterator[Event]:
        """Opens a message, unless one is open."""
        if self._open:
            return
        self._open = True
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
        self._output.append(item | {"content": [part]})
        yield self._item_event("response.output_item.added", item | {"content": []})
        yield self._part_event("response.content_part.added", part=part)

    def _stop(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = "completed"
        [part] = item["content"]
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=[])
        yield self._part_event("response.content_part.done", part=part)
        yield self._item_event("response.output_item.done", item)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        item = {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call["id"],
            "name": function["name"],
        }
        done = item | {"arguments": function["arguments"], "status": "completed"}
        self._output.append(done)
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield self._item_event("response.output_item.added", item | {"arguments": "", "status": "in_progress"})
        yield self._event("response.function_call_arguments.delta", delta=function["arguments"], **place)
        yield self._event("response.function_call_arguments.done", arguments=function["arguments"], **place)
        yield self._item_event("response.output_item.done", done)

    def _event(self, name: str, **fields: Any) -> Event:
        self._events += 1
        return name, {"type": name, "sequence_number": self._events - 1, **fields}

    def _item_event(self, name: str, item: dict[str, Any]) -> Event:
        return self._event(name, output_index=len(self._output) - 1, item=item)

    def _part_event(self, name: str, **fields: Any) -> Event:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._event(name, **place, **fields)


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a list of items: calls in a row are one message's."""
    found: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            role = item["role"]
            found.append({"role": ROLES.get(role, role), "content": _content(item["content"])})
        elif kind == "function_call":
            if not found or "tool_calls" not in found[-1]:
                found.append({"role": "assistant", "content": "", "tool_calls": []})
            function = {"name": item["name"], "arguments": item["arguments"]}
            found[-1]["tool_calls"].append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "function_call_output":
            output = item["output"]
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": text_of(output)})
    return found


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": part["image_url"]}
        if "image_url" in part
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


def _usage(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's names for responses; drafts are as in chat completions."""
    if usage is None:
        return None
    details = {
        "input_tokens_details": usage.get("prompt_tokens_details", {}),
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    more = {name: usage[name] for name in OURS if name in usage}
    return counts | {"total_tokens": usage["total_tokens"]} | details | more
