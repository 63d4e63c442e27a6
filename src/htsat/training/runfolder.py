"""The run folder: what survives whatever ends a process.

It holds ``recipe.json`` (resolved), ``log.jsonl`` (one line per step, and per score on the selection split),
``timing.jsonl``, ``state.pt`` and ``state.previous.pt`` (to resume from), ``best-*.safetensors`` (candidates by
selection score), ``unreadable.tsv``, ``skipped.jsonl``, and at the end ``model.safetensors`` and ``report.json``.

A state is written to a new file, synced, and put in place by renaming; the one before stays as
``state.previous.pt``. It begins with the SHA-256 of the rest. So at any moment at least one whole state lies there
once the first was written, and damage is noticed.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from htsat.errors import CheckpointError, OutputError
from htsat.files import write_atomic
from htsat.training.recipe import Recipe, recipe_json

#: first bytes of a state, before its SHA-256
MAGIC = b"htsat state 1\n"
#: whatever a damaged file makes of the reader
_DAMAGE = (
    OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_path = path / "state.pt"
        self.previous_path = path / "state.previous.pt"
        self.log_path = path / "log.jsonl"
        self.timing_path = path / "timing.jsonl"

    # -------------------------------------------------------------- begin

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Refuse a folder that does not fit what is asked for; nothing is written.

        Raises:
            CheckpointError: there is nothing to resume, or it belongs to another recipe.
            OutputError: it holds a run already, and ``resume`` is False.
        """
        if not resume:
            names = ("recipe.json", "state.pt", "state.previous.pt", "model.safetensors")
            try:
                taken = any((self.path / name).exists() for name in names)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be looked at: {error.strerror}; choose another --out") from None
            if taken:
                raise OutputError(
                    f"{self.path}: already holds a run; pass --resume to go on with it, or choose another --out"
                )
            return
        try:
            kept = (self.path / "recipe.json").read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise CheckpointError(
                f"{self.path}: nothing to resume: it holds no recipe.json; leave out --resume"
            ) from None
        if kept != recipe_json(recipe):
            raise CheckpointError(
                f"{self.path}: holds a run of another recipe{_difference(kept, recipe)}; "
                "resume it with that one, or choose another --out"
            )

    def make(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path}: the run folder cannot be made: {error.strerror}; choose another --out"
            ) from None

    def begin(self, recipe: Recipe) -> None:
        """Write the recipe.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomic(self.path / "recipe.json", recipe_json(recipe))

    # -------------------------------------------------------------- states

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write a state; when this returns, it is on the disk.

        Raises:
            OutputError: it cannot be written; the one before is still there.
        """
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getbuffer()
        temporary = self.path / "state.tmp"
        try:
            for log in self._logs():
                _sync(log)  # the lines of the steps that the state has behind it
            with temporary.open("wb") as file:
                file.write(MAGIC + hashlib.sha256(data).digest())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if self.state_path.exists():
                self.state_path.replace(self.previous_path)
            temporary.replace(self.state_path)
            self.sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OutputError(
                f"{self.state_path}: the training state cannot be saved: {error.strerror or error}; "
                "free space and use --resume"
            ) from None

    def sync(self) -> None:
        """Wait until the names of the files, too, are on the disk.

        Raises:
            OSError: the disk fails.
        """
        _sync(self.path)

    def load_state(self) -> dict[str, Any] | None:
        """Return the newest whole state, or None if none was ever written.

        A damaged newest one is replaced by the one before: the next save must not put it in that one's place.

        Raises:
            CheckpointError: there are states, and all are damaged.
            OutputError: a damaged one cannot be replaced.
        """
        problems = []
        for path in (self.state_path, self.previous_path):
            if not path.exists():
                continue
            try:
                state = _read_state(path)
            except _DAMAGE as error:
                problems.append(f"{path}: {' '.join(str(error).split())[:200] or type(error).__name__}")
                continue
            if problems:
                try:
                    path.replace(self.state_path)
                    self.sync()
                except OSError as error:
                    raise OutputError(
                        f"{self.state_path}: is damaged and cannot be replaced by {path.name}: "
                        f"{error.strerror or error}; make the folder writable"
                    ) from None
            return state
        if problems:
            raise CheckpointError(
                f"{problems[0]}: cannot be resumed: the file is damaged; delete it and its previous one, and pass "
                "--resume to begin this run again"
            )
        return None

    # -------------------------------------------------------------- logs

    def cut_logs(self, steps: int) -> None:
        """Drop lines behind ``steps`` and broken ones: those steps are done again.

        Raises:
            OutputError: a log cannot be read or written.
        """
        for path in self._logs():
            cut_log(path, steps)

    def _logs(self) -> list[Path]:
        return [p for p in (self.log_path, self.timing_path, self.path / "skipped.jsonl") if p.exists()]

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Add a line to a log.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written: {error.strerror or error}; free space and use --resume"
            ) from None

    def write_parts(self, parts: Mapping[str, Sequence[str]]) -> None:
        """List which clip was trained on, selected on or scored."""
        lines = [f"{name}\t{part}" for part, names in parts.items() for name in names]
        write_atomic(self.path / "parts.tsv", "\n".join(["filename\tpart", *lines]) + "\n")

    def write_unreadable(self, unreadable: Mapping[str, str]) -> None:
        """List the clips that could not be read."""
        lines = [f"{name}\t{' '.join(reason.split())}" for name, reason in sorted(unreadable.items())]
        write_atomic(self.path / "unreadable.tsv", "\n".join(["filename\treason", *lines]) + "\n")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _read_state(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin like a training state")
    if hashlib.sha256(data[start:]).digest() != data[len(MAGIC) : start]:
        raise ValueError("its checksum is wrong")
    state: dict[str, Any] = torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)
    return state


def cut_log(path: Path, steps: int) -> None:
    """Drop lines of a log that are behind ``steps``, or broken."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; mend its permissions") from None
    kept: dict[tuple[int, bool], str] = {}
    for line in lines:
        try:
            record = json.loads(line)
            key = int(record["step"]), "selection" in record
        except (ValueError, TypeError, LookupError):
            continue  # the line that the end of the process cut off
        if line.endswith("\n") and key[0] <= steps:
            kept[key] = line  # the last one counts: its step led to the saved state
    if len(kept) < len(lines):
        write_atomic(path, "".join(kept[key] for key in sorted(kept)))


def _difference(kept: str, recipe: Recipe) -> str:
    """Return in which settings the recipe text of a run folder differs, if it can be told."""
    try:
        before, now = _flat(json.loads(kept)), _flat(json.loads(recipe_json(recipe)))
    except (ValueError, RecursionError):
        return ""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return f" (other {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})" if names else ""


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
