"""Runs a command in several processes on this machine whose links are as slow as told.

python -m mlx_redrafter.benchmarks.machines.slow_link --latency-ms 1 -n 2 -- bench speed --methods chain:3 auto

Knows nothing of the command. MLX's ring goes through this process, which passes everything on after a while; so no
privileges and no kernel's traffic control are needed. Passing on takes some 0.1 ms itself, and cores: what one machine
computes for several processes is no speed of several machines. Shown is what latency does to the methods beside each
other. What the host shares (`system.ranks`) goes straight.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time

from mlx_redrafter.system.flag_types import real, whole

HERE = "127.0.0.1"


def slow_port(target: int, seconds: float) -> int:
    """A port whose connections are those of another one, with everything so much later in both directions."""
    server = socket.create_server((HERE, 0))

    def accept() -> None:
        while True:
            near, _ = server.accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what waits for more costs 40 ms
            far = _reach(target)
            for source, sink in ((near, far), (far, near)):
                waiting = queue.SimpleQueue[tuple[float, bytes]]()
                threading.Thread(target=_read, args=(source, waiting, seconds), daemon=True).start()
                threading.Thread(target=_write, args=(sink, waiting), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(server.getsockname()[1])


def _reach(port: int) -> socket.socket:
    """A connection to a process that may not listen yet."""
    while True:
        try:
            found = socket.create_connection((HERE, port))
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return found
        except ConnectionRefusedError:
            time.sleep(0.05)


def _read(source: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]], seconds: float) -> None:
    data = b"-"
    while data:
        try:
            data = source.recv(1 << 16)
        except OSError:
            data = b""
        waiting.put((time.perf_counter() + seconds, data))


def _write(sink: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    while True:
        due, data = waiting.get()
        time.sleep(max(0.0, due - time.perf_counter()))
        try:
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)
        except OSError:
            return


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server((HERE, 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


def launch(words: list[str], processes: int, seconds: float) -> int:
    """Runs `mlx-redrafter` with these words in each process; the exit code of the first one."""
    ports = free_ports(processes)
    slow = [[port if i == rank else slow_port(port, seconds) for i, port in enumerate(ports)]
            for rank in range(processes)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(processes):
            file = pathlib.Path(folder) / f"hosts-{rank}.json"
            file.write_text(json.dumps([[f"{HERE}:{port}"] for port in slow[rank]]))
            # What steps cost over such a link is nothing to keep for these addresses.
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file), "MLX_REDRAFTER_TUNING": folder}
            command = [sys.executable, "-m", "mlx_redrafter.cli.main", *words]
            running.append(subprocess.Popen(command, env=os.environ | environment))
        codes = [process.wait() for process in running]
    return codes[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=real(0), default=1.0, help="of a link, one way (default: %(default)s)")
    parser.add_argument("-n", type=whole(2), default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("words", nargs="+", metavar="-- COMMAND", help="of mlx-redrafter, with its flags")
    args = parser.parse_args(argv)
    return launch(args.words, args.n, args.latency_ms / 1000)


if __name__ == "__main__":
    sys.exit(main())
