"""One request on its way from its HTTP thread to the generation thread and back. Knows nothing of HTTP."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from queue import Queue
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationArguments

from mlx_redrafter.constraints.constraint import Constraint
from mlx_redrafter.constraints.tools import ToolCalls


@dataclasses.dataclass(eq=False)
class Request(CompletionRequest):
    """What mlx_lm knows of a request, and what has to travel with it.

    Attributes:
        num_draft_tokens: the node budget it asks for; None for the server's own shape.
        constraint: what its answer has to be; None for any text.
        calls: the tool calls that its answer may have, of which the model's tokenizer makes a constraint.
        thinking_budget: tokens of a thought, where it limits them.
        hung_up: whether its client has gone; asked while it waits.
        arrived: when, on the monotonic clock.
        begun: set when its turn has come.
        cancelled: set when its generation is to end, since nobody waits for the answer any more.
        left: whether its HTTP thread has left; that of rank 0, where several processes generate.
        look: called by who generates, where others than its HTTP thread have to set `cancelled`.
        tokens: the whole prompt, once it is known.
        last: the newest response of its generation, whose figures are those of the text so far.
        stopped_by: the stop string that ended its text.
        logprobs: of the tokens that its HTTP thread has not told of yet, where they were asked for.
        taken: tokens that its HTTP thread has taken since it last told of them.
        first_seconds: how old it was when the first one came.
        responses: what is said to its HTTP thread: progress, responses, an error, None at the end.
        taken_up: whether the generation thread has taken it from the queue.
        texts: of the responses of a batch, of which mlx_lm's loop knows the tokens alone.
        looked: when it was last looked whether the client is still there.
    """

    num_draft_tokens: int | None = None
    constraint: Constraint | None = None
    calls: ToolCalls | None = None
    thinking_budget: int | None = None
    hung_up: Callable[[], bool] = lambda: False
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    begun: threading.Event = dataclasses.field(default_factory=threading.Event)
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    left: bool = False
    look: Callable[[], None] = lambda: None
    tokens: list[int] = dataclasses.field(default_factory=list)
    last: Any = None
    stopped_by: str | None = None
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    taken: int = 0
    first_seconds: float | None = None
    responses: Queue[Any] = dataclasses.field(default_factory=Queue)
    taken_up: bool = False
    texts: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    looked: float = dataclasses.field(default_factory=time.monotonic)

    __hash__ = object.__hash__

    @property
    def age(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived

    def note(self, response: Any) -> None:
        """Keeps the newest response."""
        self.last = response
        if self.first_seconds is None:
            self.first_seconds = self.age

    def is_time_to_look(self, seconds: float) -> bool:
        """Whether the last look is longer ago than this; then this is the next one."""
        now = time.monotonic()
        if now - self.looked < seconds:
            return False
        self.looked = now
        return True


@dataclasses.dataclass
class Arguments(GenerationArguments):
    """What mlx_lm knows of how a request is to be answered, and the request."""

    request: Request
