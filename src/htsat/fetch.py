"""One address to one file: resumed where an earlier attempt broke off, verified, whole or not at all.

What has arrived lies in ``NAME.part`` beside the file, with the address and the version it came from in
``NAME.part.json``; the file itself appears only when it is complete and its checksum is right.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from htsat.errors import DownloadError, OutputError
from htsat.files import write_atomic

#: called with the bytes that have arrived and the bytes in all (None: the server does not tell)
OnBytes = Callable[[int, int | None], None]

_BLOCK = 1 << 20
#: answers that another attempt may change
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
_LONGEST_WAIT = 60.0
#: room that a download leaves on the disk
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Retry:
    """How often and how patiently an interrupted download is taken up again.

    Attributes:
        attempts: tries without progress before giving up; a try that brought at least a megabyte starts the count anew.
        wait: seconds before the second try; doubled each time, up to a minute.
        timeout: seconds of silence after which a connection counts as broken.
    """

    attempts: int = 5
    wait: float = 1.0
    timeout: float = 30.0


def fetch(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    advice: str = "try again later",
    room: int = 0,
    retry: Retry | None = None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Bring what ``url`` serves to ``target``, unless it is there already.

    Args:
        url: http or https; redirects are followed.
        target: the file; its folder is made. A file that is there and fits ``checksum`` and ``size`` is left alone;
            one that does not is replaced.
        checksum: ``sha256:`` or ``md5:`` and hexadecimal digits; None: only the length is verified.
        size: bytes; None: as the server says.
        advice: what a user may do instead, for messages.
        room: further bytes that the disk must have, for what is made of the file.
        retry: attempts and waits.
        on_bytes: told of progress.

    Raises:
        DownloadError: no such file, no access, no network after all attempts (what has arrived is kept and taken up
            by the next call), or the content is not the published one (then it is deleted).
        OutputError: the folder cannot be written, or the disk has too little room.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: expected an address that begins with http:// or https://")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if target.is_file() and _fits(target, checksum, size):
                return
            _Download(url, target, checksum, size, advice, room, retry or Retry(), on_bytes).run()
    except OSError as error:
        # Those of the network are answered where they occur; these are of the disk.
        raise OutputError(
            f"{error.filename or target}: cannot be written: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error


def read_url(url: str, *, limit: int = 1 << 22, advice: str = "try again later", retry: Retry | None = None) -> bytes:
    """Return what a small address serves.

    Raises:
        DownloadError: it cannot be had, or is longer than ``limit`` bytes.
    """
    retry = retry or Retry()
    for attempt in range(1, retry.attempts + 1):
        try:
            with _open(url, {}, retry.timeout) as response:
                data = bytes(response.read(limit + 1))
        except _NETWORK_ERRORS as error:
            _judge(url, error, attempt, retry, advice)
            continue
        if len(data) > limit:
            raise DownloadError(f"{url}: more than {limit:,} bytes; this is not the page expected here; {advice}")
        return data
    raise AssertionError("the last attempt raises")


def checksum_of(path: Path, kind: str) -> str:
    """Return ``sha256:...`` or ``md5:...`` of a file's content."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


class _BrokenOffError(Exception):
    """A connection ended before the content did."""


_NETWORK_ERRORS = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, _BrokenOffError)


@dataclass
class _Download:
    """One file under way."""

    url: str
    target: Path
    checksum: str | None
    size: int | None
    advice: str
    room: int
    retry: Retry
    on_bytes: OnBytes | None

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.note = self.target.with_name(f"{self.target.name}.part.json")

    def run(self) -> None:
        """Try until the content is complete, then verify it and give it its name."""
        attempt = 1
        while True:
            before = self._have()
            try:
                self._attempt()
                break
            except _NETWORK_ERRORS as error:
                attempt = 1 if self._have() >= before + _BLOCK else attempt
                have = self._have()
                kept = f"; the first {have:,} bytes are kept, run it again to resume" if have else ""
                _judge(self.url, error, attempt, self.retry, self.advice, kept)
                attempt += 1
        if not _fits(self.part, self.checksum, self.size):
            self._forget()
            raise DownloadError(
                f"{self.url}: what {urlsplit(self.url).netloc} sent is not the published file (its checksum or size "
                f"differs) and was deleted; try again, check the proxy or mirror in between, or {self.advice}"
            )
        self.part.replace(self.target)
        self.note.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _attempt(self) -> None:
        """Ask for what is missing and write it as it comes."""
        have, headers = self._resume()
        try:
            with _open(self.url, headers, self.retry.timeout) as response:
                total = _length(response)
                if response.status == 206:
                    start, total = _range(response)
                    if start != have:
                        raise _BrokenOffError(f"the server sent bytes from {start:,} instead of {have:,}")
                else:
                    have = 0  # no ranges there, or another version by now: from the start
                if self.size is not None and total is not None and total != self.size:
                    raise DownloadError(
                        f"{self.url}: the server offers {total:,} bytes, the published file has {self.size:,}; "
                        f"check the proxy or mirror in between, or {self.advice}"
                    )
                self._check_room((total or self.size or 0) - have)
                self._remember(response)
                self._copy(response, have, total)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not have:
                raise
            # Nothing lies after what we have: it is all there, or it belongs to something longer.
            with error:
                if _range(error)[1] == have:
                    return
            self._forget()
            raise _BrokenOffError("what had arrived before is longer than the file") from None

    def _resume(self) -> tuple[int, dict[str, str]]:
        """Return how many bytes are here and the headers that ask for the others, of the same version."""
        have = self._have()
        if not have:
            return 0, {}
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            validator = note["validator"] if note["url"] == self.url else None
        except (OSError, ValueError, KeyError, TypeError):
            validator = None
        if validator is None and self.checksum is None:
            # Nothing would tell two versions sewn together from the published file.
            self._forget()
            return 0, {}
        headers = {"Range": f"bytes={have}-"}
        if validator is not None:
            headers["If-Range"] = str(validator)
        return have, headers

    def _remember(self, response: Any) -> None:
        etag = response.headers.get("ETag")
        # A weak one promises the same meaning, not the same bytes.
        validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        write_atomic(self.note, json.dumps({"url": self.url, "validator": validator}))

    def _copy(self, response: Any, have: int, total: int | None) -> None:
        with self.part.open("r+b" if have else "wb") as file:
            file.seek(have)
            while True:
                try:
                    # read1: what has arrived, not a full block, so that little is lost when the line breaks.
                    block = response.read1(_BLOCK)
                except _NETWORK_ERRORS as error:
                    raise _BrokenOffError(_reason(error)) from error
                if not block:
                    break
                file.write(block)
                have += len(block)
                if total is not None and have > total:
                    break
                if self.on_bytes is not None:
                    self.on_bytes(have, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and have < total:
            raise _BrokenOffError(f"the connection broke off after {have:,} of {total:,} bytes")

    def _check_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < wanted + self.room + _SPARE_BYTES:
            raise OutputError(
                f"{self.target.parent}: the disk has {free / 1e9:.1f} GB free, "
                f"{(wanted + self.room + _SPARE_BYTES) / 1e9:.1f} GB are needed; free some space or choose another disk"
            )


def _open(url: str, headers: dict[str, str], timeout: float) -> Any:
    # identity: a length and a range of compressed bytes would be those of something else
    request = urllib.request.Request(url, headers={"User-Agent": "htsat", "Accept-Encoding": "identity", **headers})
    return urllib.request.urlopen(request, timeout=timeout)


def _judge(url: str, error: BaseException, attempt: int, retry: Retry, advice: str, kept: str = "") -> None:
    """Wait, where another attempt may help; else raise.

    Raises:
        DownloadError: it cannot help, or this was the last.
    """
    host = urlsplit(url).netloc
    wait = min(_LONGEST_WAIT, retry.wait * 2 ** (attempt - 1))
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code not in _PASSING:
            what = {401: "refuses access", 403: "refuses access", 404: "has no such file", 410: "has no such file"}
            raise DownloadError(f"{url}: {host} {what.get(error.code, 'answered')} ({error.code}); {advice}") from None
        with contextlib.suppress(TypeError, ValueError):
            wait = max(wait, min(_LONGEST_WAIT, float(error.headers["Retry-After"])))
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    hopeless = isinstance(cause, (socket.gaierror, ssl.SSLCertVerificationError))
    if hopeless or attempt >= retry.attempts:
        tried = "" if hopeless else f" after {attempt} attempts"
        raise DownloadError(
            f"{url}: the download from {host} failed{tried} ({_reason(error)}){kept}; check the network, or {advice}"
        ) from error
    time.sleep(wait)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answer {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _length(response: Any) -> int | None:
    text = response.headers.get("Content-Length") or ""
    return int(text) if text.isdecimal() else None


def _range(response: Any) -> tuple[int, int | None]:
    """Return the first byte and the whole length that ``Content-Range`` tells, -1 and None where it does not."""
    unit, _, value = (response.headers.get("Content-Range") or "").partition(" ")
    span, _, total = value.partition("/")
    first = span.partition("-")[0]
    start = int(first) if unit == "bytes" and first.isdecimal() else -1
    return start, int(total) if total.isdecimal() else None


def _fits(path: Path, checksum: str | None, size: int | None) -> bool:
    if size is not None and path.stat().st_size != size:
        return False
    return checksum is None or checksum_of(path, checksum.partition(":")[0]) == checksum.lower()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let one process at a time fetch a file; the others wait and find it there."""
    from filelock import FileLock

    with FileLock(target.with_name(f"{target.name}.lock")):
        yield
