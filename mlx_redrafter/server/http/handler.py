"""HTTP in front of the generation: who may ask what, and answers with figures; the rest is mlx_lm's handler.

Knows nothing of models.
"""

from __future__ import annotations

import io
import json
import re
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from mlx_lm.server import APIHandler

from mlx_redrafter.constraints.constraint import Constraint
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.errors import one_line
from mlx_redrafter.server import metrics
from mlx_redrafter.server.answers import GONE, Answer, answer_to
from mlx_redrafter.server.generation import GenerationThread
from mlx_redrafter.server.http import access, bodies, figures
from mlx_redrafter.server.http.catalogue import in_hub_cache
from mlx_redrafter.server.requests import Request
from mlx_redrafter.server.structured import calls_of, constraint_of
from mlx_redrafter.server.translations.events import EventWriter, Translation
from mlx_redrafter.server.translations.messages import Messages
from mlx_redrafter.server.translations.responses import Responses

ALIASES = {"/chat/completions": "/v1/chat/completions"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TRANSLATIONS: dict[str, Callable[[dict[str, Any]], Translation]] = {
    "/v1/messages": Messages,
    "/v1/responses": Responses,
}
LENGTH = re.compile("[0-9]{1,18}")
DRAIN_SECONDS = 5.0  # for which a refused body is read: a client that is still sending it could not read the answer


class Handler(APIHandler):
    """One request.

    Args:
        response_generator: the server's.
    """

    timeout = 60  # seconds without a byte, in or out
    server_version, sys_version = "mlx-redrafter", ""
    default_request_version = "HTTP/1.0"  # of what is no request: an older one would get no status line
    response_generator: GenerationThread

    def setup(self) -> None:
        super().setup()
        self._answered, self._unread, self.status = False, 0, 0
        self.stream = False
        self._request: Request | None = None
        self._translation: Translation | None = None
        self._constraint: Constraint | None = None
        self._calls: ToolCalls | None = None

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_OPTIONS(self) -> None:
        self._answer(super().do_OPTIONS)

    def _answer(self, method: Callable[[], None]) -> None:
        """Runs a method; whatever it raises ends this request and nothing else."""
        path = self.path.partition("?")[0]
        path = self.path = ALIASES.get(path, path)
        length = self.headers.get("Content-Length", "")
        self._unread = int(length) if LENGTH.fullmatch(length) else 0
        try:
            self._check_access()
            method()
        except Answer as answer:
            self._refuse(answer)
        except OSError:
            self.status = GONE
        except Exception as error:
            self._refuse(answer_to(error))
        known = path in bodies.description()["paths"]
        self.response_generator.metrics.count_request(path if known else "other", self.status)

    def _refuse(self, answer: Answer) -> None:
        self.close_connection = True
        if answer.status == GONE:
            self.status = GONE
            return
        content = json.dumps(answer.body()).encode()
        try:
            if self._answered:  # half an answer is out: only a stream can still say what is wrong
                if self.stream:
                    self.wfile.write(b"data: " + content + b"\n\n")
                return
            self._drain()
            self._headers_buffer: list[bytes] = []
            self._set_completion_headers(answer.status)
            if answer.retry_after is not None:
                self.send_header("Retry-After", str(answer.retry_after))
            if answer.status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self._send(content)
        except OSError:
            self.status = GONE

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in our form."""
        if not hasattr(self, "headers"):  # it was refused before it was read
            self.headers = self.MessageClass()
        self._refuse(Answer(int(code), message or self.responses[code][0]))

    def _check_access(self) -> None:
        args = self.response_generator.cli_args
        access.check_origin(self.headers, args.allowed_origins)
        if self.path != "/health" and self.command != "OPTIONS":
            access.check_key(self.headers, args.api_key)

    def _set_cors_headers(self) -> None:
        for name, value in access.cors_headers(self.headers, self.response_generator.cli_args.allowed_origins).items():
            self.send_header(name, value)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise Answer(411, "the header Content-Length is missing")
        if not LENGTH.fullmatch(length):
            raise Answer(400, f"Content-Length is {length[:30]!r}, expected a whole number")
        most = self.response_generator.limits.body_bytes
        if self._unread > most:
            raise Answer(413, f"the body has {length} bytes, expected at most {most}")
        raw = self.rfile.read(self._unread)
        if len(raw) < self._unread:
            raise Answer(GONE, "the client hung up")
        self._unread = 0
        return raw

    def _drain(self) -> None:
        end = time.monotonic() + DRAIN_SECONDS
        while self._unread > 0 and time.monotonic() < end and (read := self.rfile.read(min(self._unread, 1 << 16))):
            self._unread -= len(read)

    def _post(self) -> None:
        path = self.path
        if path not in (CHAT, TEXT, *TRANSLATIONS):
            raise Answer(404, f"there is no {path} to post to")
        body = bodies.read(self._read_body(), path)
        if path in TRANSLATIONS:
            path, self._translation = CHAT, TRANSLATIONS[path](body)
            body = bodies.check(self._translation.chat(), path)
            if body.get("stream"):
                self.wfile = EventWriter(self.wfile, self._translation)  # type: ignore[assignment]
        if path == TEXT and isinstance(prompt := body["prompt"], list) and not isinstance(prompt[0], int):
            [body["prompt"]] = prompt
        self._give_on(path, self._with_defaults(path, body))

    def _with_defaults(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A checked body as mlx_lm's handler takes it."""
        limits, args = self.response_generator.limits, self.response_generator.cli_args
        schema = "response_format.json_schema.schema" if self._translation is None else "text.format.schema"
        self._constraint = constraint_of(body, schema)
        self._calls = calls_of(body) if path == CHAT else None  # to a text they are unknown fields
        body.setdefault("model", self.response_generator.model_provider.name)
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        if most is None:
            body["max_tokens"] = min(args.max_tokens, limits.max_tokens or args.max_tokens)
        elif limits.max_tokens is not None and most > limits.max_tokens:
            raise Answer(400, f"max_tokens is {most}, expected at most {limits.max_tokens}")
        if body.get("tool_choice") == "none":
            body.pop("tools", None)
        for name in ("xtc_probability", "xtc_threshold"):  # mlx_lm's takes no whole numbers for them
            if name in body:
                body[name] = float(body[name])
        if "seed" in body:
            body["seed"] &= 0xFFFFFFFF
        options = body.get("stream_options") or {}
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
        return body

    def _give_on(self, path: str, body: dict[str, Any]) -> None:
        """Lets mlx_lm's handler answer a request with this body."""
        raw = json.dumps(body).encode()
        self.path, self.rfile = path, io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        super().do_POST()

    def validate_model_parameters(self) -> None:
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise Answer(400, one_line(error)) from None

    def handle_chat_completions(self) -> Request:
        return self._accept(super().handle_chat_completions())

    def handle_text_completions(self) -> Request:
        return self._accept(super().handle_text_completions())

    def _accept(self, theirs: Any) -> Request:
        self._request = Request(
            **vars(theirs),
            num_draft_tokens=self.body.get("num_draft_tokens"),
            constraint=self._constraint,
            calls=self._calls,
            thinking_budget=self.body.get("thinking_budget"),
            hung_up=self._hung_up,
        )
        return self._request

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        with self.response_generator.attending(request):
            super().handle_completion(request, stop_words)

    def _hung_up(self) -> bool:
        """Whether the client has closed its end."""
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def generate_response(self, text: str, finish_reason: Any, *others: Any, **named: Any) -> dict[str, Any]:
        response = super().generate_response(text, finish_reason, *others, **named)
        assert self._request is not None
        [choice], last = response["choices"], self._request.last
        if told := self._request.logprobs[: self._request.taken]:
            choice["logprobs"] = {"content": told, "refusal": None}
            del self._request.logprobs[: len(told)]
            self._request.taken = 0
        if finish_reason is not None and last is not None:
            response["timings"] = figures.timings(last)
            if self._request.stopped_by is not None:
                choice["stop_reason"] = self._request.stopped_by
        if "usage" in response:
            response["usage"] |= figures.usage(last)
        if self._translation is not None and not self.stream:
            return self._translation.whole(response)
        return response

    def completion_usage_response(self, *counts: Any) -> dict[str, Any]:
        response = super().completion_usage_response(*counts)
        last = None if self._request is None else self._request.last
        response["object"] = self.object_type
        response["usage"] |= figures.usage(last)
        return response

    def end_headers(self) -> None:
        super().end_headers()
        self._answered = True

    def send_response(self, code: int, message: str | None = None) -> None:
        self.status = code
        super().send_response(code, message)

    def _get(self) -> None:
        if self.path == "/health":
            self.handle_health_check()
        elif self.path == "/metrics":
            self.send_response(200)
            self.send_header("Content-Type", metrics.CONTENT_TYPE)
            self._set_cors_headers()
            self._send(self.response_generator.metrics.text())
        elif self.path == "/openapi.json":
            self._send_json(bodies.description())
        elif self.path == "/v1/models":
            self._send_json({"object": "list", "data": self._models()})
        elif self.path.startswith("/v1/models/"):
            name = self.path.removeprefix("/v1/models/")
            found = [model for model in self._models() if model["id"] == name]
            if not found:
                raise Answer(404, f"there is no model {name} here")
            self._send_json(found[0])
        else:
            raise Answer(404, f"there is no {self.path} to get")

    def _models(self) -> list[dict[str, Any]]:
        """The served target first, then those of the Hub's cache that a request may name."""
        names = [self.response_generator.model_provider.name]
        if self.response_generator.loads_others:
            names += sorted(in_hub_cache() - set(names))
        return [{"id": name, "object": "model", "created": self.created} for name in names]

    def _send_json(self, value: Any) -> None:
        self._set_completion_headers(200)
        self._send(json.dumps(value).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
