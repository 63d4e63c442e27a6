"""What a server is told when it starts."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from htsat.backends import BackendName, Precision, cores
from htsat.errors import UsageError

#: names of models that fit an address and a header
_NAME = re.compile(r"[\w.-]{1,64}")
#: bytes of a token: what a header may hold, without spaces
_TOKEN = re.compile(r"[!-~]{8,512}")
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


@dataclass(frozen=True)
class ServeSettings:
    """Everything that a server, and each of its worker processes, needs to know.

    Attributes:
        models: (name, what ``Predictor`` takes) of each; the first one is the default.
        host: address to listen at.
        port: to listen at; 0: any that is free.
        workers: processes that answer; they share the address.
        tokens: any of them lets a request in; none: every request is let in.
        cors: origins (``https://example.org``) whose pages may use the API.
        allowed_hosts: names, beside those of this machine, that requests may be addressed to.
        proxies: addresses of balancers, whose word is taken for who the client is.
        backend: what runs the networks.
        precision: of the networks.
        threads: of the CPU for the networks, in all workers together; None: one for each core.
        batch_size: chunks in a call of a network that gains by it.
        max_bytes: of a body.
        max_seconds: of a recording.
        max_files: in a body.
        max_requests: that a worker has at once, beyond, 503; None: see ``requests_of_a_worker``.
        max_client_requests: of one client, beyond, 429; None: half of them.
        max_streams: of a worker at once.
        max_connections: of a worker at once.
        max_wait: seconds that a chunk may wait until it is heard.
        timeout: seconds that a request may take.
        grace: seconds that accepted requests have to finish when the server is told to stop.
        decoders: processes of a worker that decode recordings; None: see ``decoders_of_a_worker``.
        hop_seconds: between the results of a stream, if it does not ask for another.
    """

    models: tuple[tuple[str, str], ...] = (("default", "default"),)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    tokens: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    backend: BackendName = "auto"
    precision: Precision = "float32"
    threads: int | None = None
    batch_size: int = 4
    max_bytes: int = 100_000_000
    max_seconds: float = 3600.0
    max_files: int = 16
    max_requests: int | None = None
    max_client_requests: int | None = None
    max_streams: int = 16
    max_connections: int = 1000
    max_wait: float = 10.0
    timeout: float = 300.0
    grace: float = 30.0
    decoders: int | None = None
    hop_seconds: float = 1.0

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if not names:
            raise UsageError("a server needs at least one model; name one, such as default")
        for name in names:
            if not _NAME.fullmatch(name):
                raise UsageError(f"model name {name!r}: expected letters, digits, '.', '_' and '-'; give NAME=PATH")
            if names.count(name) > 1:
                raise UsageError(f"two models are called {name!r}; give one of them another name: NAME=PATH")
        for token in self.tokens:
            if not _TOKEN.fullmatch(token):
                raise UsageError(
                    "a token must be 8 to 512 printable ASCII characters without spaces; "
                    'make one: python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
                )
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(f"--cors {origin}: expected an origin such as https://example.org, without a path")
        for name in ("workers", "batch_size", "max_bytes", "max_files", "max_connections"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_seconds", "max_wait", "timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0 seconds, got {getattr(self, name):g}")
        for name in ("threads", "decoders", "max_requests", "max_client_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be 0 to 65535, got {self.port}")

    @property
    def threads_of_a_worker(self) -> int:
        """Threads for the networks in each worker: workers x threads are those of the machine."""
        return max(1, (self.threads or cores()) // self.workers)

    @property
    def decoders_of_a_worker(self) -> int:
        """Processes that decode: more than threads, for that of a long recording waits while it is heard."""
        return self.decoders or min(self.requests_of_a_worker, 8 + 4 * self.threads_of_a_worker)

    @property
    def requests_of_a_worker(self) -> int:
        """Requests at once: enough to keep all threads busy, few enough that the last one does not wait long."""
        return self.max_requests or max(16, 8 * self.threads_of_a_worker)

    @property
    def requests_of_a_client(self) -> int:
        """Requests that one client may have at once: half, so that there is room for another."""
        most = self.requests_of_a_worker
        return min(most, self.max_client_requests or max(1, most // 2))


def named_models(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return (name, source) of models given as NAME=PATH, as a path or as a name; none: the bundled one."""
    named = []
    for text in given or ["default"]:
        name, equals, source = text.partition("=")
        if equals and source and _NAME.fullmatch(name):
            named.append((name, source))
        else:
            stem = Path(text).stem if Path(text).suffix in (".safetensors", ".onnx") else text.rsplit("/", 1)[-1]
            named.append((re.sub(r"[^\w.-]", "-", stem), text))
    return tuple(named)


def read_tokens(token: str | None, file: Path | None) -> tuple[str, ...]:
    """Return the tokens that let clients in.

    Args:
        token: one; None: that of HTSAT_TOKEN, if there is no file either.
        file: one a line; blank lines and those that begin with # do not count.

    Raises:
        UsageError: the file cannot be read or holds none.
    """
    if file is None:
        token = token if token is not None else os.environ.get("HTSAT_TOKEN")
        return () if token is None else (token,)
    if token is not None:
        raise UsageError("--token and --token-file exclude each other; give one")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: tokens cannot be read ({error}); give a text file with one a line") from None
    return _tokens(file, text.splitlines())


def _tokens(file: Path, lines: Iterable[str]) -> tuple[str, ...]:
    tokens = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not tokens:
        raise UsageError(f"{file}: holds no token; write one a line")
    return tokens
