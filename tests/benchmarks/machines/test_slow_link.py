"""Links that are as slow as told. That a command runs over them is shown by hand: it takes two processes."""

import socket
import threading
import time

from mlx_redrafter.benchmarks.machines.slow_link import HERE, slow_port


def test_everything_comes_later():
    """If this fails, what is called a slow link is none, or loses what it passes on."""
    server = socket.create_server((HERE, 0))

    def answer():
        with server.accept()[0] as found:
            while data := found.recv(1 << 16):
                found.sendall(data)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    content, begin = bytes(range(256)) * 1000, time.perf_counter()
    with socket.create_connection((HERE, slow_port(server.getsockname()[1], 0.05))) as near:
        near.sendall(content)
        near.shutdown(socket.SHUT_WR)
        got = b""
        while data := near.recv(1 << 16):
            got += data
    assert got == content and time.perf_counter() - begin >= 0.1
    thread.join(10)
    server.close()
