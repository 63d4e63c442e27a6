"""A server in a process of its own, and clients that break rules, for tests."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil

EXAMPLES = Path(__file__).parents[1] / "examples"


class Server:
    """``htsat serve`` with the bundled model on one thread; a context manager."""

    def __init__(self, *arguments, threads=1):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("HTSAT_TOKEN", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "htsat", "serve", "--port", "0", "--threads", str(threads), *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._ready.wait(60) or self.process.poll() is not None:
            self.stop(signal.SIGKILL)
            raise AssertionError("the server did not start: " + "".join(self.lines))
        self.pid = self.process.pid
        address = next(found for line in self.lines if (found := re.search(r"http://\S+:(\d+)", line)))
        self.port = int(address[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.address, timeout=30)
        until(lambda: self.client.get("/readyz").status_code == 200)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "listening at" in line:
                self._ready.set()
        self._ready.set()
        self.process.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.stop(signal.SIGTERM)

    def stop(self, number):
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join()
        return code

    def post(self, path, content=b"", **settings):
        """Send a recording as it is; a name of an example stands for its content."""
        if isinstance(content, str):
            content = (EXAMPLES / content).read_bytes()
        headers = {"Content-Type": "application/octet-stream"} | settings.pop("headers", {})
        return self.client.post(path, content=content, headers=headers, **settings)

    def metric(self, name, **labels):
        """Return the sum of a metric over all labels that are not given."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(\{{.*\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def connect(self, receive_buffer=None):
        """Return a plain connection."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        connection.settimeout(20)
        return connection

    def family(self):
        """Return the processes of the server, itself first."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def memory(self):
        """Return the bytes that the server itself has."""
        return psutil.Process(self.process.pid).memory_info().rss


def until(condition, seconds=10.0):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def answer_of(connection):
    """Read one HTTP answer to the end of the connection or its length; return status, headers and JSON."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            break
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", 0))
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            break
        body += piece
    return int(first.split()[1]), headers, json.loads(body[:length])


def raw(server, head, *pieces):
    """Send a request as bytes and return its answer; what cannot be sent any more does not matter."""
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head)
            for piece in pieces:
                connection.sendall(piece)
        return answer_of(connection)


def head(*lines, path="/v1/tag", method="POST"):
    """Return the head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")
