"""The run folder: whatever fails, a state that loads is there, and none is said to be saved that is not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from miniature_corpora import make_esc50
from trainings import SMALL

from htsat.errors import CheckpointError, OutputError
from htsat.labels import label_set
from htsat.training import loop
from htsat.training.journal import Journal
from htsat.training.loop import train
from htsat.training.recipe import load_recipe
from htsat.training.runfolder import RunFolder, cut_log

#: what may fail in a save, in the order in which it is called
CALLS = ("fsync", "replace", "replace", "open", "fsync")


def state(step):
    return {"step": step, "weights": torch.full((1000,), float(step))}


def saved(path):
    """A folder with the states of the steps 1 and 2."""
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    folder.save_state(state(1))
    folder.save_state(state(2))
    return folder


def step_of(path):
    found = RunFolder(path).load_state()
    assert found is not None
    assert torch.equal(found["weights"], state(found["step"])["weights"])
    return found["step"]


class StopError(BaseException):
    """Stands for whatever ends a process: nothing may catch it."""


class Failing:
    """Lets the ``n``-th of the calls that change files fail, or stops there."""

    def __init__(self, patch, n, problem):
        self.n, self.problem, self.calls = n, problem, []
        for name in ("fsync", "replace", "open"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        patch.setattr("io.open", self._wrapped("io.open", open))

    def _wrapped(self, name, plain):
        def call(*arguments, **settings):
            if name != "io.open" or (len(arguments) > 1 and "w" in arguments[1]):
                self.calls.append(name)
                if len(self.calls) == self.n:
                    raise self.problem
            return plain(*arguments, **settings)

        return call


def calls_of_a_save(path):
    folder = saved(path)
    with pytest.MonkeyPatch.context() as patch:
        watched = Failing(patch, 0, None)
        folder.save_state(state(3))
    assert [name for name in watched.calls if name != "io.open"] == list(CALLS)
    return len(watched.calls)


def test_stopped_at_any_call_of_a_save(tmp_path):
    """The state of the step before or of this one is there, never none; and the next save works."""
    count = calls_of_a_save(tmp_path / "count")
    assert count >= 6
    found = []
    for n in range(1, count + 1):
        folder = saved(tmp_path / str(n))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
            Failing(patch, n, StopError())
            folder.save_state(state(3))
        found.append(step_of(folder.path))
        folder.save_state(state(4))
        assert step_of(folder.path) == 4
    assert found[0] == 2 and found[-1] == 3 and set(found) == {2, 3}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_any_call_of_a_save_fails(tmp_path, number):
    for n in range(1, calls_of_a_save(tmp_path / "count") + 1):
        folder = saved(tmp_path / str(n))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError) as caught:
            Failing(patch, n, OSError(number, os.strerror(number)))
            folder.save_state(state(3))
        assert "\n" not in str(caught.value) and os.strerror(number) in str(caught.value)
        assert not (folder.path / "state.tmp").exists()
        assert step_of(folder.path) in (2, 3)


def test_a_write_fails_half_way(tmp_path):
    folder = saved(tmp_path / "run")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); import signal; "
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    body = "import sys, torch; from pathlib import Path; from htsat.training.runfolder import RunFolder; "
    body += "RunFolder(Path(sys.argv[1])).save_state({'step': 3, 'weights': torch.zeros(1000)})"
    done = subprocess.run([sys.executable, "-c", limit + body, folder.path], capture_output=True, text=True)
    assert done.returncode == 1 and "OutputError" in done.stderr and "too large" in done.stderr
    assert step_of(folder.path) == 2


def test_synced_before_it_is_said(tmp_path, monkeypatch):
    """Log, then state, then its name: each on the disk before the next."""
    folder = saved(tmp_path / "run")
    folder.append(folder.log_path, {"step": 3})
    order = []
    plain_sync, plain_replace = os.fsync, os.replace

    def fsync(descriptor):
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        plain_sync(descriptor)

    def replace(source, target):
        order.append(("replace", Path(source).name, Path(target).name))
        plain_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    folder.save_state(state(3))
    assert order == [
        ("fsync", "log.jsonl"),
        ("fsync", "state.tmp"),
        ("replace", "state.pt", "state.previous.pt"),
        ("replace", "state.tmp", "state.pt"),
        ("fsync", "run"),
    ]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    else:
        content[:4] = b"PK\3\4"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "other"])
def test_damaged_states(tmp_path, how):
    folder = saved(tmp_path / "run")
    damage(folder.state_path, how)
    assert step_of(folder.path) == 1
    # The damaged one must not take the place of the whole one at the next save, wherever that stops.
    for n in range(1, calls_of_a_save(tmp_path / "count") + 1):
        again = tmp_path / f"again{n}"
        shutil.copytree(folder.path, again)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
            Failing(patch, n, StopError())
            RunFolder(again).save_state(state(3))
        assert step_of(again) in (1, 3)

    folder = saved(tmp_path / "both")
    for path in (folder.state_path, folder.previous_path):
        damage(path, how)
    with pytest.raises(CheckpointError, match=r"state\.pt: .*the file is damaged; delete it") as caught:
        folder.load_state()
    assert "\n" not in str(caught.value)


def test_nothing_saved_yet(tmp_path):
    assert RunFolder(tmp_path).load_state() is None
    (tmp_path / "state.tmp").write_bytes(b"half of the first one")
    assert RunFolder(tmp_path).load_state() is None


def test_log_by_hand(tmp_path):
    """Lines behind the state and broken ones go; of a step that was done twice, the later line counts."""
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', '{"step": 2, "selection": {"a": 1}}',
             '{"step": 3, "loss": 1}', '{"step": 2, "loss": 9}', "[]", '{"step": null}', '{"step": 2, "lo']  # fmt: skip
    path.write_text("\n".join(lines))
    cut_log(path, 2)
    assert path.read_text().splitlines() == [lines[0], lines[4], lines[2]]
    cut_log(path, 0)
    assert path.read_text() == ""
    cut_log(tmp_path / "absent.jsonl", 2)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("data"), seconds=0.5, labels=label_set("esc50")[:3])


def recipe(*settings):
    return load_recipe("esc50", [*SMALL, "train.steps=2", "train.select_steps=0", "train.patience=0", *settings])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(recipe(), data, out)
    return out


def test_a_second_process_in_the_same_folder(data, finished, monkeypatch):
    monkeypatch.setattr(loop, "LOCK_SECONDS", 0.1)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with FileLock(finished / ".lock"), pytest.raises(OutputError, match="another process is training in this folder"):
        train(recipe(), data, finished, resume=True)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_another_run_that_began_while_the_data_were_read(data, tmp_path, monkeypatch):
    """Its recipe must not be overwritten."""
    out, plain = tmp_path / "run", loop.open_run_data

    def slow(*arguments):
        out.mkdir()
        (out / "recipe.json").write_text("another one's")
        return plain(*arguments)

    monkeypatch.setattr(loop, "open_run_data", slow)
    with pytest.raises(OutputError, match="already holds a run"):
        train(recipe(), data, out)
    assert (out / "recipe.json").read_text() == "another one's"


def test_resume_with_other_data(data, finished, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    table = fewer / "meta/esc50.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    next((fewer / "audio").glob("5-*-B-2.wav")).unlink()
    with pytest.raises(CheckpointError, match="begun with other clips or labels"):
        train(recipe(), fewer, finished, resume=True)


def test_both_states_damaged(data, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("state.pt", "state.previous.pt"):
        (out / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="cannot be resumed: the file is damaged"):
        train(recipe(), data, out, resume=True)


def test_curves_never_end_a_run(tmp_path, monkeypatch):
    """TensorBoard's writer fails on a full disk when it is made, or later; the exact log does the complaining."""
    pytest.importorskip("tensorboard")
    notes = []
    (tmp_path / "tensorboard").write_text("in the way")
    journal = Journal(recipe(), tmp_path, 0, notes.append)
    step = loop.Step(10, 20, 1.0, 1.0, 0.1, 5.0)
    journal.step(step)
    journal.close()
    (tmp_path / "tensorboard").unlink()
    journal = Journal(recipe(), tmp_path, 0, notes.append)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal._board, "add_scalar", full)
    journal.step(step)
    journal.step(step)
    journal.close()
    assert len(notes) == 2 and "No space left on device" in notes[1]


#: a run on a disk that is full after its first state; then on the same one, read-only; then on a sound one
DRIVER = """
import json, os, subprocess, sys
from pathlib import Path
from htsat.errors import HtsatError
from htsat.training.loop import train
from htsat.training.recipe import load_recipe
from htsat.training.runfolder import RunFolder
disk, data, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
out, filler, recipe = disk / "run", disk / "filler", load_recipe("esc50", settings)
def fill(step):
    if step.step == 3:
        left, half = os.statvfs(disk), (out / "state.pt").stat().st_size // 2
        filler.write_bytes(bytes(max(0, left.f_bavail * left.f_frsize - half)))
def attempt(resume, on_step):
    try:
        train(recipe, data, out, resume=resume, on_step=on_step)
        print("finished")
    except HtsatError as error:
        print("error:", error)
    print("state", RunFolder(out).load_state()["step"])
attempt(False, fill)
filler.unlink()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
attempt(True, lambda step: None)
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
attempt(True, lambda step: None)
"""


def test_disk_that_is_full_and_one_that_is_read_only(data, tmp_path):
    """A real file system in a mount namespace of its own."""
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no mounts in a namespace of one's own here: {probe.stderr.strip()[:80]}")
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = [*SMALL, "train.steps=6", "train.select_steps=0", "train.patience=0", "train.save_steps=2"]
    script = 'set -e; mount -t tmpfs -o size=16m none "$1"; shift; exec "$@"'
    command = [sys.executable, "-c", DRIVER, disk, data, json.dumps(settings)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", disk, *command], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    full, first, read_only, second, end, last = done.stdout.splitlines()
    assert full.startswith("error:") and "No space left on device" in full and "saved" in full
    assert read_only.startswith("error:") and "read-only" in read_only.lower()
    assert (first, second, end, last) == ("state 2", "state 2", "finished", "state 6")
