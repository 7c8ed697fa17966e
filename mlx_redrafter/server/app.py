"""Puts the parts of the server together, and takes them apart in order at the end. Knows nothing of requests."""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.server import get_system_fingerprint

from mlx_redrafter.errors import UserError
from mlx_redrafter.server.answers import logger
from mlx_redrafter.server.caches.files import CacheFiles
from mlx_redrafter.server.caches.memory import PromptCaches
from mlx_redrafter.server.caches.shared import SharedPromptCaches
from mlx_redrafter.server.generation import GenerationThread
from mlx_redrafter.server.http.handler import Handler
from mlx_redrafter.server.limits import Limits
from mlx_redrafter.server.provider import Provider
from mlx_redrafter.server.together import GenerationTogether
from mlx_redrafter.system.ranks import connected
from mlx_redrafter.text.sessions.recorder import Recorder


class Server(ThreadingHTTPServer):
    """A thread per connection, bound to its address before the models are loaded and listening after.

    Raises:
        UserError: the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int):
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, address = found[0][0], found[0][4]
            super().__init__((str(address[0]), port), Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.error("a connection ended with an error", exc_info=sys.exc_info())


def generation(args: argparse.Namespace) -> GenerationThread:
    """What writes the answers, in this process or, with others, in all that the target is split over."""
    limits = Limits(args.max_body_bytes, args.max_context, args.most_max_tokens, args.max_queue, args.queue_seconds)
    sizes, folder, ranks = (args.prompt_cache_size, args.prompt_cache_bytes), args.prompt_cache_dir, connected()
    if ranks is not None:
        return GenerationTogether(Provider(args), SharedPromptCaches(ranks, *sizes), limits, ranks)
    files = None if folder is None else CacheFiles(pathlib.Path(folder).expanduser(), args.prompt_cache_dir_bytes)
    form = "" if args.kv_bits is None else f"-{args.kv_bits}-{args.kv_group_size}-{args.quantized_kv_start}"
    recorder = Recorder() if args.record_sessions else None
    return GenerationThread(Provider(args), PromptCaches(*sizes, files, form), limits, recorder)


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[Server]:
    """A server that is up while the block lasts.

    Raises:
        UserError: a wrong flag, a model that cannot be loaded, an address that cannot be had.
    """
    server = Server(args.host, args.port)
    generator = generation(args)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    try:
        generator.started.result()
        fingerprint = get_system_fingerprint()
        server.RequestHandlerClass = functools.partial(Handler, generator, system_fingerprint=fingerprint)  # type: ignore
        server.server_activate()
        thread.start()
        yield server
    finally:
        if thread.is_alive():
            server.shutdown()
        server.server_close()
        generator.stop_and_join()


def serve(args: argparse.Namespace) -> None:
    """Serves until it is interrupted or terminated; of several processes, until rank 0 is."""
    if (ranks := connected()) is not None and not ranks.first:
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal tells all, and the others end when rank 0 does
            signal.signal(number, signal.SIG_IGN)
        generator = generation(args)
        generator.started.result()
        generator.join()
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(args) as server, contextlib.suppress(KeyboardInterrupt):
            print(f"Serving {args.model} at {server.url}", flush=True)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)
