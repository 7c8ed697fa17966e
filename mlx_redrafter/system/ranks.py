"""The processes that compute together, and how all of them hear what the first one says.

Knows nothing of what they compute. Numbers on the device go through MLX's own collectives. What the host decides
goes over sockets of its own: a collective would wait behind the step that is on its way already. The same sockets
tell at once when a process is gone, which a collective does not.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import queue
import secrets
import socket
import sys
import threading
import time
from typing import Any, NoReturn, TextIO, TypeVar

import mlx.core as mx

from mlx_redrafter.errors import UserError

T = TypeVar("T")

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by mlx.launch, Open MPI and MPICH for their processes
CONNECT = 30.0  # seconds that processes have to find each other
# A machine without power closes no connection. After so many seconds of silence it is asked whether it is there, so
# often, and so many times in vain; or it has so many milliseconds to confirm what was sent.
ALIVE = {"KEEPIDLE": 2, "KEEPINTVL": 1, "KEEPCNT": 4, "USER_TIMEOUT": 6000}
ALIVE_MACOS = {0x10: 2, 0x80: 6}  # its TCP_KEEPALIVE and TCP_RXT_CONNDROPTIME, in seconds
LEAVING = 10.0  # seconds that one who has ended waits for the others
FAILING = 30.0  # seconds that one whose work has failed waits for the others to fail at it
LONGEST_CARD = 1024  # bytes that say where the first process listens
VALUE, DONE, FAILED = "value", "done", "failed"
NOTHING_MORE = object()  # comes from a process that is done
FAILED_TOO, GO_ON = ("failed too",), ("go on",)

LAUNCHED_TOGETHER = any(name in os.environ for name in LAUNCHED)  # what only several processes need is left out else


@functools.cache
def number_of_ranks() -> int:
    """The size of MLX's group of processes; 1, without starting a backend, where nothing launched one."""
    if not any(name in os.environ for name in LAUNCHED) or not mx.distributed.is_available():
        return 1
    return mx.distributed.init().size()


@functools.cache
def all_ranks() -> Ranks:
    """The processes of MLX's group; connects them at first use, which all have to come to."""
    return Ranks(mx.distributed.init())


def connected() -> Ranks | None:
    """The processes of MLX's group; None where there is one."""
    return all_ranks() if number_of_ranks() > 1 else None


class Ranks:
    """The processes of a group, of which rank 0 decides.

    When one is gone without a word, the others end within seconds: one of them says so in a line, and their exit
    code is 1. That takes a thread for each connection, since whoever waits in a collective waits for ever.

    Args:
        group: MLX's.

    Attributes:
        rank, size: of this process, and of the group.
        voice: where its last line goes.
    """

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, int(group.rank()), int(group.size())
        self.voice: TextIO = sys.stderr
        self._leaving, self._ending = False, threading.Lock()
        self._links = {rank: _Link(self, rank, found) for rank, found in self._connect().items()}
        atexit.register(self.leave)

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, and that speaks to the user."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """What rank 0 gave. All have to call it, in the same order."""
        if not self.first:
            return self._links[0].value()
        for link in self._links.values():
            link.send(VALUE, value)
        return value

    def first_of(self, problem: str) -> str:
        """A problem that any of them has, on all of them; empty where none has one."""
        if not self.first:
            self._links[0].send(VALUE, problem)
            return self._links[0].value()
        found = [problem, *(link.value() for _, link in sorted(self._links.items()))]
        return self.share(next(filter(None, found), ""))

    def all_failed(self, line: str) -> None:
        """Is called by whoever's work has failed, with how. If it has on all, they go on; else all end."""
        if self.first:
            together = all(link.value(FAILING) == FAILED_TOO for link in self._links.values())
        else:
            self._links[0].send(VALUE, FAILED_TOO)
            together = self._links[0].value(FAILING) == GO_ON
        if not together:
            self.fail(line, 1)
        if self.first:
            self.share(GO_ON)

    def clock(self) -> float:
        """Seconds by the clock of rank 0, for loops that all leave together."""
        return self.share(time.perf_counter())

    def agree(self, numbers: mx.array) -> mx.array:
        """Whole numbers as rank 0 has them, as a lazy graph: rounding may differ between machines."""
        # The others' are zeros that depend on theirs, which keeps collectives in one order.
        return mx.distributed.all_sum(numbers * int(self.first), group=self.group)

    def check_same(self, facts: dict[str, str]) -> None:
        """Raises UserError, in rank 0, for another rank that has other facts; the others are ended by that.

        Args:
            facts: by what they are of, for people; what one of two ranks does not have is not compared.
        """
        if not self.first:
            self._links[0].send(VALUE, facts)
            return
        for rank, link in sorted(self._links.items()):
            theirs = link.value()
            for name in sorted(facts.keys() & theirs.keys()):
                if facts[name] != theirs[name]:
                    raise UserError(f"rank {rank}: {name} is {theirs[name]}, expected {facts[name]}, as on rank 0")

    def key(self) -> dict[str, Any]:
        """What the costs of a collective depend on: how many take part, and by which means and addresses."""
        return {"size": self.size, **_settings()}

    def leave(self) -> None:
        """Is called at the end of a process that has done its work; the others may still be at theirs, for a while.

        A script may also end early, by sys.exit: whoever waits for it in a collective is to notice.
        """
        if self._leaving or hasattr(sys, "last_value"):  # it ends with an exception: the others are to notice
            return
        self._leaving = True
        for link in self._links.values():
            link.send(DONE)
        until = time.monotonic() + LEAVING
        for link in self._links.values():
            link.done.wait(max(0.0, until - time.monotonic()))

    def fail(self, line: str, code: int) -> NoReturn:
        """Ends all processes with this exit code and, unless it is empty, one line that rank 0 prints."""
        if not self.first or code == 1:
            time.sleep(1.0)  # rank 0 says the same, or the process is gone without which this one could not go on
        self.end(line, code, speaker=0)

    def end(self, line: str, code: int, speaker: int) -> NoReturn:
        """Ends this process, and tells the others to; the speaker prints the line."""
        with self._ending:  # for good: whoever comes second has nothing to add
            for link in self._links.values():
                link.send(FAILED, (f"rank {self.rank}: {line}" if line and not self.first else line, code))
            if line and self.rank == speaker:
                print(f"mlx-redrafter: error: {line}", file=self.voice, flush=True)
            for stream in (sys.stdout, self.voice):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    continue
            os._exit(code)

    def lost(self, rank: int) -> None:
        """Is called when a connection broke."""
        if not self._leaving:
            others = "it" if self.size == 2 else "the others"
            self.end(f"rank {rank} of {self.size} is gone, {others} cannot go on", 1, speaker=int(rank == 0))

    def told(self, rank: int, line: str, code: int) -> None:
        """Is called when another process says that all have to end."""
        self.end(line if self.first else "", code, speaker=0)

    def _connect(self) -> dict[int, socket.socket]:
        """A connection between rank 0 and each of the others, by the rank at the other end."""
        if not self.first:
            card = json.loads(self._card(b""))
            found = _reach(card["hosts"], card["port"])
            found.sendall(bytes.fromhex(card["word"]) + self.rank.to_bytes(2, "big"))
            return {0: found}
        word, links = secrets.token_bytes(16), dict[int, socket.socket]()
        with socket.create_server(("", 0), backlog=self.size) as server:
            server.settimeout(CONNECT)
            card = {"hosts": _settings()["hosts"][0], "port": server.getsockname()[1], "word": word.hex()}
            self._card(json.dumps(card).encode())
            while len(links) < self.size - 1:
                try:
                    found, _ = server.accept()
                    found.settimeout(CONNECT)
                    said = found.recv(len(word) + 2, socket.MSG_WAITALL)
                except TimeoutError:
                    missing = sorted(set(range(1, self.size)) - links.keys())
                    raise UserError(f"rank {missing[0]} does not reach rank 0 at {card['hosts'][0]}") from None
                if secrets.compare_digest(said[: len(word)], word):
                    links[int.from_bytes(said[len(word) :], "big")] = found
                else:
                    found.close()
        return links

    def _card(self, content: bytes) -> bytes:
        """What rank 0 gives, by MLX's own means."""
        numbers = mx.array(list(content.ljust(LONGEST_CARD)) if self.first else [0] * LONGEST_CARD, mx.int32)
        found: Any = mx.distributed.all_sum(numbers, group=self.group, stream=mx.cpu).tolist()
        return bytes(found)


class _Link:
    """A connection to another process; a thread of its own reads what comes."""

    def __init__(self, ranks: Ranks, rank: int, connection: socket.socket):
        self.rank, self._ranks, self._connection = rank, ranks, connection
        self._values = queue.SimpleQueue[Any]()
        self.done = threading.Event()  # no more comes from there
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {getattr(socket, f"TCP_{name}", None): value for name, value in ALIVE.items()}
        for option, value in (options | (ALIVE_MACOS if sys.platform == "darwin" else {})).items():
            if option is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._out = connection.makefile("wb")
        threading.Thread(target=self._read, name=f"rank {rank}", daemon=True).start()

    def send(self, kind: str, value: Any = None) -> None:
        try:
            pickle.dump((kind, value), self._out)
            self._out.flush()
        except (OSError, ValueError):  # the reading thread finds out as well, and says so
            return

    def value(self, seconds: float | None = None) -> Any:
        """The next one that comes; None where none does within so many seconds."""
        try:
            found = self._values.get(timeout=seconds)
        except queue.Empty:
            return None
        if found is NOTHING_MORE:
            self._ranks.lost(self.rank)
        return found

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while True:
                    kind, value = pickle.load(stream)
                    if kind == VALUE:
                        self._values.put(value)
                    elif kind == FAILED:
                        self._ranks.told(self.rank, *value)
                    else:
                        self._values.put(NOTHING_MORE)
                        self.done.set()  # and on to the connection's end, which is early if we still wait for something
        except Exception:  # a broken connection, or whatever another program sends
            self.done.set()
            self._ranks.lost(self.rank)


def _settings() -> dict[str, Any]:
    """The backend, and the addresses of rank 0 first, as far as mlx.launch has noted them for its processes."""
    if file := os.environ.get("MLX_HOSTFILE"):
        with open(file) as stream:
            return {"backend": "ring", "hosts": [[at.rpartition(":")[0] for at in one] for one in json.load(stream)]}
    if place := os.environ.get("MLX_JACCL_COORDINATOR"):
        backend = "jaccl-ring" if os.environ.get("MLX_JACCL_RING") else "jaccl"
        return {"backend": backend, "hosts": [[place.rpartition(":")[0]]]}
    return {"backend": "other", "hosts": [[socket.gethostname(), "127.0.0.1"]]}


def _reach(hosts: list[str], port: int) -> socket.socket:
    error: OSError = OSError("no address")
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=CONNECT / 3)
        except OSError as found:
            error = found
    raise UserError(f"rank 0 cannot be reached at {', '.join(hosts)} port {port}: {error}")
