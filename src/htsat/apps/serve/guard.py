"""Who may enter, and how many: tokens, origins, and a bounded number of requests.

A refusal is cheap: it comes before the body is read, and where a server is full before the request is even parsed.
"""

import asyncio
import hashlib
import ipaddress
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from htsat.apps.serve.settings import ServeSettings

#: the cookie by which the page shows that a token was given
COOKIE = "htsat_token"
#: seconds over which requests are counted to tell how fast they are answered
_RATE_SECONDS = 10.0
#: at most this long is a client told to wait
_MOST_RETRY = 60


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        code: what programs tell errors apart by.
        message: what came, what was expected, what to do.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"code": self.code, "message": self.message}}


class Gate:
    """Counts the requests that are being answered, and refuses those beyond the limits.

    A request has a slot while it is worked on. One whose body takes long to arrive gives its slot to others meanwhile
    (``Ticket.park``) and gets the next one that is free, before any new request.

    Args:
        slots: requests at once.
        share: of one client at once.
        max_wait: seconds that a new request may have to wait for those before it.
        wait: tells how long it would.
    """

    def __init__(self, slots: int, share: int, max_wait: float, wait: Callable[[], float] = lambda: 0.0) -> None:
        self._slots, self._share, self._max_wait, self._wait = slots, share, max_wait, wait
        self._taken = 0
        self._parked = 0
        self._clients: Counter[str] = Counter()
        self._queue: deque[asyncio.Future[None]] = deque()
        self._finished: deque[float] = deque(maxlen=1024)
        self.closed = False
        """the server stops: nobody is let in any more"""

    @property
    def inside(self) -> int:
        """Requests that were let in and not yet answered."""
        return self._taken + self._parked

    @property
    def retry_after(self) -> int:
        """Seconds after which half of those inside will be answered, at the rate of the last seconds."""
        now = time.monotonic()
        while self._finished and now - self._finished[0] > _RATE_SECONDS:
            self._finished.popleft()
        if not self._finished:
            return 1
        rate = len(self._finished) / max(1.0, now - self._finished[0])
        return max(1, min(_MOST_RETRY, math.ceil(self.inside / 2 / rate)))

    def status(self, client: str) -> int:
        """Return with which status a new request of a client would be refused; 200: it would not."""
        if self.closed or self._taken >= self._slots or self._queue:
            return 503
        if self._clients[client] >= self._share:
            return 429
        return 503 if self._taken and self._wait() > self._max_wait else 200

    def error(self, status: int) -> ApiError:
        """Return the refusal with such a status."""
        again = {"Retry-After": str(self.retry_after)}
        if self.closed:
            return ApiError(503, "stopping", "the server is being stopped; send the request again", again)
        if status == 429:
            message = f"{self._share} requests of this client are being answered, its limit; wait for their answers"
            return ApiError(429, "too_many_requests", message, again)
        if self._taken >= self._slots or self._queue:
            message = f"the server is busy with {self.inside} requests, its limit; try again after Retry-After"
            return ApiError(503, "busy", message, again)
        wait = self._wait()
        message = f"about {wait:.1f} s of work are waiting, the limit is {self._max_wait:g} s; try again later"
        return ApiError(503, "busy", message, {"Retry-After": str(max(1, min(_MOST_RETRY, math.ceil(wait / 2))))})

    def refusal(self, client: str) -> ApiError | None:
        """Return why a new request of a client would be refused; None: it would not."""
        status = self.status(client)
        return None if status == 200 else self.error(status)

    def enter(self, client: str) -> "Ticket":
        """Let a request in.

        Raises:
            ApiError: 429 or 503, with Retry-After.
        """
        if (refusal := self.refusal(client)) is not None:
            raise refusal
        self._taken += 1
        self._clients[client] += 1
        return Ticket(self, client)

    def _give_back(self) -> None:
        while self._queue:
            waiting = self._queue.popleft()
            if not waiting.done():  # the slot goes from hand to hand
                waiting.set_result(None)
                return
        self._taken -= 1


class Ticket:
    """The place of one request; a context manager that gives it back."""

    def __init__(self, gate: Gate, client: str) -> None:
        self._gate, self._client = gate, client
        self._has_slot = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gate = self._gate
        gate._clients[self._client] -= 1
        if gate._clients[self._client] <= 0:
            del gate._clients[self._client]
        if self._has_slot:
            gate._give_back()
        else:
            gate._parked -= 1
        if kind is None:
            gate._finished.append(time.monotonic())

    def park(self) -> None:
        """Give the slot away while the body arrives, if not as many as there are slots did already."""
        gate = self._gate
        if self._has_slot and gate._parked < gate._slots:
            self._has_slot = False
            gate._parked += 1
            gate._give_back()

    async def resume(self) -> None:
        """Get a slot again, as soon as there is one."""
        if self._has_slot:
            return
        gate = self._gate
        if gate._taken < gate._slots and not gate._queue:
            gate._taken += 1
        else:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            gate._queue.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():
                    gate._give_back()
                raise
        self._has_slot = True
        gate._parked -= 1


class Keys:
    """Says whether what a request shows opens the server. Compares in constant time.

    Args:
        tokens: none: everything is open.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        # A cookie does not hold the token itself.
        self._cookies = [hashlib.sha256(b"cookie" + digest).hexdigest() for digest in self._digests]

    @property
    def open(self) -> bool:
        """Whether no token is needed."""
        return not self._digests

    def client(self, token: str | None) -> int | None:
        """Return which token this is; None: none of them."""
        given = hashlib.sha256((token or "").encode("utf-8", "surrogateescape")).digest()
        found = [number for number, digest in enumerate(self._digests) if secrets.compare_digest(digest, given)]
        return found[0] if found and token else None

    def cookie(self, client: int) -> str:
        """Return the cookie of a token."""
        return self._cookies[client]

    def cookie_client(self, cookie: str | None) -> int | None:
        """Return which token a cookie stands for; None: none."""
        given = (cookie or "").encode("utf-8", "surrogateescape")
        found = [n for n, value in enumerate(self._cookies) if secrets.compare_digest(value.encode(), given)]
        return found[0] if found else None


def bearer(header: str | None) -> str | None:
    """Return the token of an Authorization header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def cookie_of(header: str | None) -> str | None:
    """Return our cookie of a Cookie header."""
    for part in (header or "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def host_name(host: str | None) -> str:
    """Return the name of a Host header, without the port."""
    return (urlsplit(f"//{host}").hostname or "") if host else ""


def same_origin(origin: str, host: str | None) -> bool:
    """Return whether an Origin header names the server that the Host header names."""
    default = {"http": 80, "https": 443}
    try:
        came, here = urlsplit(origin), urlsplit(f"//{host or ''}")
        if came.scheme not in default or not here.hostname:
            return False
        ports = {came.port or default[came.scheme]}, {here.port} if here.port else set(default.values())
        return came.hostname == here.hostname and bool(ports[0] & ports[1])
    except ValueError:
        return False


class Hosts:
    """Says whether a request is addressed to this server.

    A page on the web can make its own name mean 127.0.0.1 and so read what a server without a token says to pages of
    the same origin. It cannot have an address, or ``localhost``, as its name.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._any = bool(settings.tokens) or not _is_loopback(settings.host)
        self._names = {"localhost", settings.host.lower(), *(name.lower() for name in settings.allowed_hosts)}

    def allows(self, host: str | None) -> bool:
        """Return whether a Host header is all right."""
        try:
            name = host_name(host)
        except ValueError:
            return False
        return self._any or name in self._names or name.endswith(".localhost") or _is_address(name)


def is_exposed(host: str) -> bool:
    """Return whether others than this machine may reach a server that listens at ``host``."""
    return not _is_loopback(host)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return a header of a request, by its name in small letters."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1")
    return None
