"""Errors a user may meet.

Every message is one line that says what came, what was expected and what to do next,
and names the file it is about. Commands print it after ``htsat:`` and go on with the
next input.
"""

import difflib
from collections.abc import Iterable


class HtsatError(Exception):
    """Base of every error this package raises on purpose."""


class AudioError(HtsatError):
    """A recording cannot be read or lies outside the supported limits."""


class CheckpointError(HtsatError):
    """A checkpoint is damaged, of another program, unsafe, or does not fit its own configuration."""


class ConfigError(HtsatError):
    """A configuration or recipe has an unknown key, a wrong type or a value out of range."""


class DataError(HtsatError):
    """A labelled data set is incomplete or contradicts itself."""


class DownloadError(HtsatError):
    """A named model cannot be fetched or fails its verification."""


class OutputError(HtsatError):
    """A result cannot be written."""


class UsageError(HtsatError):
    """An argument does not make sense (command line: exit code 2)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
