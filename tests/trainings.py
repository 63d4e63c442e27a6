"""Trainings in miniature, in processes of their own that can be killed.

A ``Nursery`` is a process that has imported everything and only forks: a training begins within milliseconds, and
nothing it does, or suffers, reaches the test. What a rank runs is ``htsat train ...`` in the environment that
``torchrun`` would give it. A piece of source text, its *mishap*, may be run in it first.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
#: a network of some thousand weights on half-second clips, everything random switched on, selecting and averaging
SMALL = (
    "frontend.sample_rate=8000", "frontend.n_fft=256", "frontend.hop_length=160", "frontend.f_max=4000.0",
    "frontend.n_mels=64", "model.image_size=128", "model.chunk_seconds=5.0", "model.stem=patch", "model.patch_size=4",
    "model.embed_dim=16", "model.depths=[1, 1, 1]", "model.num_heads=[2, 2, 2]", "model.window_size=4",
    "model.drop_path=0.1", "data.clip_seconds=0.5", "data.select=0.3", "data.test_fold=5", "train.threads=1",
    "train.epochs=0", "train.steps=8", "train.batch_size=4", "train.precision=float32", "train.select_steps=2",
    "train.keep_best=2", "train.patience=4", "train.save_steps=3",
)  # fmt: skip

#: kills at the ``{n}``-th step, right before or after the weights move (or do not: half precision may overflow)
AT_STEP = """
import os, signal, torch
calls = [0]
def dying(plain):
    def call(*arguments, **settings):
        calls[0] += 1
        if calls[0] == {n}:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **settings)
    return call
if {after}:
    torch.amp.GradScaler.update = dying(torch.amp.GradScaler.update)
else:
    torch.nn.utils.clip_grad_norm_ = dying(torch.nn.utils.clip_grad_norm_)
"""
#: kills before the ``{n}``-th line that writes the files of a run: states, candidates, logs, the result. Python's
#: lines are fine enough: none of them makes two system calls that change a file.
AT_LINE = """
import os, signal, sys
from htsat import files
from htsat.training import runfolder
lines, places = [0], (files.__file__, runfolder.__file__)
names = {{"save_state", "write_atomic", "append", "_sync", "cut_log", "write_unreadable", "begin"}}
def line(frame, event, argument):
    if event == "line":
        lines[0] += 1
        if lines[0] == {n}:
            os.kill(os.getpid(), signal.SIGKILL)
    return line
def call(frame, event, argument):
    code = frame.f_code
    return line if code.co_filename in places and code.co_name in names else None
sys.settrace(call)
"""
#: tells after the run how many of those lines there were; ``n`` is 0
COUNT_LINES = AT_LINE + 'LAST.append(lambda: open({path!r}, "w").write(str(lines[0])))\n'
#: a signal at the ``{n}``-th optimiser step
SIGNAL_AT_STEP = """
import os, torch
plain, calls = torch.optim.AdamW.step, [0]
def step(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] == {n}:
        os.kill(os.getpid(), {number})
    return plain(self, *args, **kwargs)
torch.optim.AdamW.step = step
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a training: exit code of each rank (negative: the signal), what they wrote, seconds."""

    codes: list[int]
    errors: list[str]
    outputs: list[str]
    seconds: float
    orphans: list[int]


class Nursery:
    """Forks trainings; see above."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS
        )

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        world: int = 1,
        mishaps: Mapping[int, str] | None = None,
        blow: tuple[float, int, Sequence[int]] | None = None,
        limit: float = 120.0,
    ) -> Outcome:
        """Run ``htsat ARGUMENTS`` in ``world`` processes.

        Args:
            arguments: of the command.
            world: how many processes.
            mishaps: rank -> source text that is run first.
            blow: seconds after the first logged step, a signal, and the ranks that get it.
            limit: seconds after which all are killed, which fails the test.
        """
        assert self._process.stdin and self._process.stdout
        job = {
            "arguments": [str(argument) for argument in arguments],
            "world": world,
            "mishaps": {str(rank): text for rank, text in (mishaps or {}).items()},
            "blow": blow,
            "limit": limit,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer.pop("late"):
            raise AssertionError(f"not done within {limit:g} s: {answer}")
        return Outcome(**answer)

    def train(self, data: Path, out: Path, *settings: str, resume: bool = False, **options: Any) -> Outcome:
        """Run ``htsat train esc50`` with ``SMALL`` and more settings."""
        given = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
        more = ["--resume"] if resume else []
        return self.run(["train", "esc50", "--data", data, "--out", out, *given, *more], **options)


@functools.cache
def nursery() -> Nursery:
    """Return the nursery of this test process."""
    found = Nursery()
    atexit.register(found.close)
    return found


def state_of(path: Path) -> dict[str, Any]:
    """Return the content of a state, checked against its checksum by other means than the program's."""
    import torch

    data = path.read_bytes()
    magic, digest, content = data[:14], data[14:46], data[46:]
    assert magic == b"htsat state 1\n" and hashlib.sha256(content).digest() == digest, path
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def differences(first: Any, second: Any, at: str = "state") -> list[str]:
    """Return where two nested values differ in any bit."""
    import torch

    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        same = same and first.numpy().tobytes() == second.numpy().tobytes()
        return [] if same else [at]
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{at}: {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [found for key in first for found in differences(first[key], second[key], f"{at}.{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{at}.{i}")]
    return [] if type(first) is type(second) and repr(first) == repr(second) else [at]


def run_differences(first: Path, second: Path) -> list[str]:
    """Return in what two finished run folders differ; speeds are not looked at, the last state is, bit by bit."""
    found = differences(state_of(first / "state.pt"), state_of(second / "state.pt"))
    names = ["log.jsonl", "report.json", "model.safetensors", "skipped.jsonl", "unreadable.tsv"]
    chosen = json.loads((first / "report.json").read_text()).get("selected_steps", [])
    names += [f"best-{step:08d}.safetensors" for step in chosen]
    for name in names:
        contents = [_content(out / name) if (out / name).exists() else None for out in (first, second)]
        if contents[0] != contents[1]:
            found.append(name)
    return found


def _content(path: Path) -> Any:
    """Return what a file says, bit by bit; the order of a checkpoint's metadata is the writing library's whim."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        # The report names the run and the files it is about.
        return data.replace(str(path.parent).encode(), b"RUN").replace(f'"{path.parent.name}"'.encode(), b'"RUN"')
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


# ------------------------------------------------------------------ the process that forks


def _serve() -> None:
    # Whatever a training imports on its way, here once for all of them; none of it starts a thread.
    for name in (
        "torch", "torch._dynamo", "torch.distributed.tensor", "torch.utils.data", "torch.utils.tensorboard",
        "torch.nn.parallel", "safetensors.torch", "sympy", "numpy.fft", "pydantic.type_adapter", "soxr",
        "htsat.cli", "htsat.training.folds", "htsat.training.loop",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        answer = _run(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [(os.memfd_create("out"), os.memfd_create("err")) for _ in range(job["world"])]
    began = time.monotonic()
    children = [_child(rank, job, port, outputs[rank]) for rank in range(job["world"])]
    log = Path(job["arguments"][job["arguments"].index("--out") + 1]) / "log.jsonl" if job["blow"] else None
    lines = len(log.read_bytes().splitlines()) if log and log.exists() else 0
    stepped = None
    late = False
    pending = dict(enumerate(children))
    codes: dict[int, int] = {}
    while pending:
        for rank, pid in list(pending.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del pending[rank]
        now = time.monotonic()
        if log is not None:
            if stepped is None and log.exists() and len(log.read_bytes().splitlines()) > lines:
                stepped = now
            if stepped is not None and now - stepped >= job["blow"][0]:
                for rank in job["blow"][2]:
                    if rank in pending:
                        os.kill(pending[rank], job["blow"][1])
                log = None
        if now - began > job["limit"]:
            late = True
            for pid in pending.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    orphans = _orphans(children)
    texts = []
    for pair in outputs:
        texts.append([os.pread(fd, 1 << 20, 0).decode(errors="replace") for fd in pair])
        for fd in pair:
            os.close(fd)
    return {
        "codes": [codes[rank] for rank in range(job["world"])],
        "outputs": [text[0] for text in texts],
        "errors": [text[1] for text in texts],
        "seconds": time.monotonic() - began,
        "orphans": orphans,
        "late": late,
    }


def _orphans(groups: Sequence[int]) -> list[int]:
    """Return processes of the sessions that the ranks led, after two seconds of grace."""
    until = time.monotonic() + 2
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[3]) in groups and fields[0] != "Z":
                    found.append(int(entry.name))
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _child(rank: int, job: dict[str, Any], port: int, outputs: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    last: list[Any] = []
    try:
        os.setsid()
        atexit._clear()  # those of the nursery
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, source in enumerate((nothing, *outputs)):
            os.dup2(source, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if job["world"] > 1:
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(job["world"]), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        import htsat.cli

        sys.argv = ["htsat", *job["arguments"]]
        try:
            mishap = job["mishaps"].get(str(rank))
            if mishap:
                exec(compile(mishap, "mishap", "exec"), {"__name__": "mishap", "LAST": last})
            htsat.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        for action in last:
            action()
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
