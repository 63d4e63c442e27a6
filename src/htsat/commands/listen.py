"""``htsat listen``: what sounds now, from a microphone, a pipe, a growing file or a stream, for weeks."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat.commands.console import cut, one_line, tell
from htsat.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from htsat.apps.listen.run import Listener, Status, Summary

_SIZES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}


def listen(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="- for stdin (raw samples or WAV), a file, or an address that ffmpeg reads (rtsp://, http:// ...).",
            show_default="the microphone",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Microphone: its number or a part of its name.", show_default="the system's")
    ] = None,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="List microphones and stop.")] = False,
    sample_rate: Annotated[
        int | None,
        typer.Option(
            help="Hz of raw samples, or that the microphone or ffmpeg is to give.", show_default="the source's"
        ),
    ] = None,
    channels: Annotated[int, typer.Option(help="Of raw samples or the microphone; they are mixed.")] = 1,
    sample_format: Annotated[
        str, typer.Option(metavar="NAME", help="Of raw samples, as ffmpeg calls it: s16le, s24le, s32le, f32le, u8 ...")
    ] = "s16le",
    follow: Annotated[bool, typer.Option("--follow", "-F", help="The file (WAV or raw samples) grows.")] = False,
    from_end: Annotated[
        bool, typer.Option("--from-end", help="With --follow: begin with what comes from now on.")
    ] = False,
    speed: Annotated[
        float, typer.Option(min=0, help="Of a finished file: times real time; 0: as fast as possible.")
    ] = 1.0,
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="stdin: who writes waits if the network is too slow, or else samples are lost and counted.",
            show_default="wait",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: every message of the stream.")] = False,
    as_tsv: Annotated[bool, typer.Option("--tsv", help="Print a table with tabs.")] = False,
    frames: Annotated[bool, typer.Option("--frames", help="With --json: also all framewise posteriors.")] = False,
    top: Annotated[int, typer.Option("--top", "-k", min=0, help="With --json: tags each time.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append events to a file: a table if it ends in .tsv, else JSON lines."),
    ] = None,
    daily: Annotated[bool, typer.Option("--daily", help="With --out: a file for each day.")] = False,
    clips: Annotated[Path | None, typer.Option(metavar="DIR", help="Save each event as a FLAC file.")] = None,
    margin: Annotated[
        float, typer.Option(min=0, max=30, help="Seconds before and behind the event in its clip.")
    ] = 1.0,
    clip_seconds: Annotated[
        float, typer.Option(min=1, max=600, help="Longest clip, without margins; of longer events the beginning.")
    ] = 60.0,
    clips_max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of all clips, such as 500M or 20G; the oldest are deleted.", show_default="no limit"
        ),
    ] = None,
    webhook: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="POST each event as JSON; may be repeated. HTSAT_WEBHOOK_TOKEN goes along."),
    ] = None,
    execute: Annotated[
        list[str] | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            help="Run this for each event: JSON on stdin, HTSAT_EVENT_LABEL ... set; no shell; may be repeated.",
        ),
    ] = None,
    exec_seconds: Annotated[float, typer.Option(min=0.1, help="That a command may take.")] = 30.0,
    min_probability: Annotated[float, typer.Option(min=0, max=1, help="Leave out events below.")] = 0.0,
    label: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Tell of this class; may be repeated.", show_default="all")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="When the first sample was, such as 2026-05-01T06:00:00+02:00.",
            show_default="now, if the source is live",
        ),
    ] = None,
    hop: Annotated[float, typer.Option(min=0.1, max=10, help="Seconds between the times at which is listened.")] = 1.0,
    lookahead: Annotated[
        float, typer.Option(min=0, max=10, help="Seconds heard behind each moment: later, and more certain.")
    ] = 0.2,
    stall: Annotated[
        float, typer.Option(min=0, help="Seconds without samples after which a source is opened again; 0: never.")
    ] = 8.0,
    retries: Annotated[
        int | None, typer.Option(min=0, help="Times to open a source again.", show_default="for ever")
    ] = None,
    buffer: Annotated[
        float, typer.Option(min=1, max=3600, help="Seconds of sound that may wait for the network.")
    ] = 30.0,
    log_every: Annotated[
        float, typer.Option(min=0, help="Seconds between lines about how it goes, off a terminal; 0: none.")
    ] = 60.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No status line, nothing about how it goes.")] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A name (see htsat models), a checkpoint, an exported model, or hf://owner/repo."
        ),
    ] = "default",
    operating_point: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings that the model has by name: high_precision, balanced, high_recall.",
            show_default="the model's",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="What runs the network: torch, compiled, onnxruntime, openvino."),
    ] = "auto",
    precision: Annotated[str, typer.Option(metavar="NAME", help="Of the network: float32 or bfloat16.")] = "float32",
    device_of_model: Annotated[
        str, typer.Option("--compute-device", help="Of the network: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="one for each core")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloaded models are kept; also HTSAT_CACHE.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download; also HTSAT_OFFLINE=1.")] = False,
) -> None:
    """Say what sounds now: events while they happen, from a microphone, a pipe, a growing file or a stream.

    Samples that cannot be heard are counted as gaps. A source that breaks off is opened again. Ctrl+C ends it; what
    sounds is closed and told before.
    """
    from htsat.apps.listen.sources import list_devices as find_devices
    from htsat.apps.listen.sources import open_source

    if list_devices:
        _show_devices(find_devices())
        return
    if as_json and as_tsv:
        raise UsageError("--json and --tsv exclude each other; give one")
    for given, name, needed, missing in (
        (frames, "--frames", as_json, "--json"),
        (daily, "--daily", out is not None, "--out FILE"),
        (clips_max_bytes is not None, "--clips-max-bytes", clips is not None, "--clips DIR"),
    ):
        if given and not needed:
            raise UsageError(f"{name} is for {missing}; give that too")
    began = None if start is None else _time(start)

    from htsat.apps.listen.outputs import Outputs, OutputSettings, Teller
    from htsat.apps.listen.run import Listener, ListenSettings, return_freed_memory
    from htsat.live import live_config
    from htsat.predict import Predictor

    limit = None if clips_max_bytes is None else _size(clips_max_bytes)
    opened = open_source(
        source,
        sample_rate=sample_rate,
        channels=channels,
        sample_format=sample_format,
        device=device,
        follow=follow,
        from_end=from_end,
        speed=speed,
        waits=wait,
    )
    choices: dict[str, Any] = {"backend": backend, "precision": precision}
    predictor = Predictor(
        model,
        **choices,
        device=device_of_model,
        threads=threads,
        operating_point=operating_point,
        cache_dir=cache_dir,
        offline=offline or None,
        on_note=tell,
    )
    if not predictor.labels:
        raise UsageError(f"model {model!r} has no classes, it gives embeddings only; choose another (htsat models)")
    try:
        live_config(predictor.config, hop, lookahead)
    except ConfigError as error:
        raise UsageError(f"--hop {hop:g} and --lookahead {lookahead:g} do not fit the model: {error}") from None
    settings = OutputSettings(
        format="json" if as_json else "tsv" if as_tsv else "table",
        out=out,
        daily=daily,
        clips=clips,
        margin=margin,
        clip_seconds=clip_seconds,
        clips_max_bytes=limit,
        webhooks=tuple(webhook or ()),
        commands=tuple(execute or ()),
        command_seconds=exec_seconds,
        min_probability=min_probability,
        labels=tuple(label or ()),
        top=top,
        frames=frames,
    )
    return_freed_memory()
    screen = _Screen(quiet, log_every)
    teller = Teller(screen.tell)
    outputs = Outputs(settings, opened.name, predictor.labels, screen.show, teller)
    listener = Listener(
        predictor,
        opened,
        outputs,
        ListenSettings(
            hop_seconds=hop,
            lookahead_seconds=lookahead,
            stall_seconds=stall,
            retries=retries,
            buffer_seconds=buffer,
            began=began,
        ),
        teller,
        model=model,
        on_status=screen.status,
    )
    if not quiet:
        tell(f"listening to {opened.name} with {model} on {predictor.backend}; stop with Ctrl+C")
    with _stopped_by_signals(listener) as received:
        try:
            summary = listener.run()
        finally:
            screen.clear()
    if not quiet:
        tell(_sentence(summary))
    if received:
        raise typer.Exit(128 + received[0])
    if summary.lost:
        raise typer.Exit(1)


@contextlib.contextmanager
def _stopped_by_signals(listener: "Listener") -> Iterator[list[int]]:
    """Let the first SIGINT or SIGTERM end the listening in order, a second one at once."""
    received: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        received.append(number)
        listener.stop()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # signals belong to that one
        yield received
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Screen:
    """Lines on stdout, messages on stderr, and below them how it goes: a line that is rewritten on a terminal.

    Args:
        quiet: nothing about how it goes.
        log_every: seconds between lines about it where there is no terminal; 0: none.
    """

    def __init__(self, quiet: bool, log_every: float) -> None:
        self._live = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._every = 0.0 if quiet or self._live else log_every
        self._logged = time.monotonic()
        self._drawn = False
        self._lock = threading.Lock()  # workers tell of failures

    def show(self, line: str) -> None:
        """Print a line to stdout."""
        with self._lock:
            self._clear()
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def tell(self, message: str) -> None:
        """Print a message to stderr."""
        with self._lock:
            self._clear()
            tell(message)

    def status(self, status: "Status") -> None:
        """Show how it goes."""
        if not self._live and (not self._every or time.monotonic() - self._logged < self._every):
            return
        self._logged = time.monotonic()
        text = _state(status)
        with self._lock:
            if not self._live:
                tell(text)
                return
            try:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            except OSError:
                columns = 80
            sys.stderr.write(f"\r\x1b[2K{cut(one_line(text), columns - 1)}")
            sys.stderr.flush()
            self._drawn = True

    def clear(self) -> None:
        """Take the status line away."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._drawn = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _state(status: "Status") -> str:
    """Return how it goes as a line."""
    if not status.position and not status.connected:
        return "waiting for sound"
    parts = [
        _clock(status.heard) if status.connected else f"{_clock(status.heard)}  no sound comes",
        "silence" if status.level == float("-inf") else f"{status.level:.0f} dBFS",
        f"real-time factor {status.factor:.2f}",
    ]
    if status.delay is not None:
        parts.append(f"delay {status.delay:.1f} s")
    if status.buffered > 1:
        parts.append(f"{status.buffered:.0f} s wait")
    if status.gaps:
        parts.append(f"{status.gaps} gaps ({status.gap_seconds:.1f} s)")
    return "  ".join([*parts, ", ".join(status.sounding)]).rstrip()


def _sentence(summary: "Summary") -> str:
    """Return what a whole run was."""
    rate = summary.sample_rate or 1
    parts = [f"heard {summary.heard / rate:.1f} s, {summary.events} event{'' if summary.events == 1 else 's'}"]
    if summary.gaps:
        count = f"{summary.gaps} gap{'' if summary.gaps == 1 else 's'}"
        parts.append(f"{count} of {summary.missing / rate:.3f} s in all")
    if summary.reopened:
        parts.append(f"opened again {summary.reopened} times")
    return "; ".join([*parts, *summary.parts])


def _show_devices(devices: Any) -> None:
    from htsat.formats import aligned

    if not devices:
        raise UsageError("no microphone was found; connect one, or give a file, an address or - for stdin")
    rows = [["number", "name", "channels", "Hz", ""]]
    rows += [
        [str(one.number), one_line(one.name), str(one.channels), str(one.sample_rate), "default" if one.default else ""]
        for one in devices
    ]
    print(aligned(rows, [True, False, True, True, False]), end="")


def _size(text: str) -> int:
    """Return bytes, of a number that may end in k, M, G or T."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if found is None:
        raise UsageError(f"--clips-max-bytes {text}: expected a size such as 500M or 20G")
    return int(float(found[1]) * _SIZES[found[2]])


def _time(text: str) -> datetime:
    """Return a time of the calendar, with its zone."""
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo is not None else time.astimezone()
    except (ValueError, OverflowError):
        raise UsageError(f"--start {text}: expected a time such as 2026-05-01T06:00:00+02:00") from None
