"""Several processes: the same clips in the same steps, the same scores, and an end for all when one fails."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature_corpora import make_esc50
from trainings import AT_STEP, SIGNAL_AT_STEP, SMALL, differences, nursery, run_differences, state_of

from htsat.labels import label_set
from htsat.training.loop import _parts
from htsat.training.order import positions_of

#: tells which clips each process learns from, part by part
RECORD = """
import json
from htsat.training import loop
plain, seen = loop.collate, []
def collate(items):
    seen.append([[item.position, item.name] for item in items])
    return plain(items)
loop.collate = collate
LAST.append(lambda: open({path!r}, "w").write(json.dumps(seen)))
"""
#: the statistics of the first batch norm as they are at the start, in any number of processes: what is left is sums
FIXED_NORM = """
import torch
from htsat.model.htsat import HTSAT
def normalise(self, log_mel):
    return (log_mel + 30) / 20 * self.mel_norm.weight + self.mel_norm.bias
HTSAT.normalise = normalise
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("data"), seconds=0.5, labels=label_set("esc50")[:4])


# ------------------------------------------------------------------ the plan


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_same_positions_for_any_number_of_processes(batch_size, accumulate):
    for world in (1, 2, 3, 4, 6):
        if batch_size % (world * accumulate):
            continue
        for step in (0, 1, 7):
            shares = [list(positions_of(step, batch_size, rank, world)) for rank in range(world)]
            assert sorted(itertools.chain(*shares)) == list(range(step * batch_size, (step + 1) * batch_size))
            assert {len(share) for share in shares} == {batch_size // world}
            pairs = set()
            for share in shares:
                parts = [list(part) for part in _parts(share, accumulate)]
                assert sorted(itertools.chain(*parts)) == sorted(share)
                pairs |= {frozenset(pair) for part in parts for pair in zip(part, reversed(part), strict=True)}
            if batch_size % (2 * world * accumulate) == 0:
                # A batch mixed with its mirror image: the pairs of one process and one part.
                whole = range(step * batch_size, (step + 1) * batch_size)
                assert pairs == {frozenset(pair) for pair in zip(whole, reversed(whole), strict=True)}


def plan_of(data, tmp_path, world, *settings):
    paths = [tmp_path / f"{world}-{rank}.json" for rank in range(world)]
    mishaps = {rank: RECORD.format(path=str(path)) for rank, path in enumerate(paths)}
    outcome = nursery().train(data, tmp_path / f"run{world}", *settings, world=world, mishaps=mishaps)
    assert outcome.codes == [0] * world, outcome.errors
    return [json.loads(path.read_text()) for path in paths]


def test_what_processes_learn_from(data, tmp_path):
    """Recorded from running processes: each step's clips are the same, each once, and dealt out evenly."""
    settings = ("train.batch_size=12", "train.steps=3", "train.select_steps=0", "train.patience=0")
    plans = {world: plan_of(data, tmp_path, world, *settings) for world in (1, 2, 3)}
    for world in (2, 3):
        for step in range(3):
            shares = [plans[world][rank][step] for rank in range(world)]
            assert {len(share) for share in shares} == {12 // world}
            assert sorted(itertools.chain(*shares)) == sorted(plans[1][0][step])


def test_two_processes_learn_what_one_learns(data, tmp_path):
    """But for the order of sums, once the batch norm's statistics and stochastic depth are taken out.

    With them the runs differ as they do for two seeds: each process normalises by its own part of the batch, and
    drops paths of its own.
    """
    settings = ("model.drop_path=0.0", "train.steps=4", "train.select_steps=0", "train.patience=0",
                "train.batch_size=8", "augment.mixup=labels", "train.learning_rate=1e-4")  # fmt: skip
    states = {}
    for world, extra in ((1, ()), (2, ()), (1, ("train.accumulate=2",))):
        out = tmp_path / f"run{world}{len(extra)}"
        mishaps = dict.fromkeys(range(world), FIXED_NORM)
        outcome = nursery().train(data, out, *settings, *extra, world=world, mishaps=mishaps)
        assert outcome.codes == [0] * world, outcome.errors
        states[world, extra] = state_of(out / "state.pt")["model"]
        assert not (out / "skipped.jsonl").exists()
    first = states.pop((1, ()))
    for other in states.values():
        for name, tensor in other.items():
            # Adam divides by the gradient's size: where that is rounding alone, a step of it is too.
            assert (tensor - first[name]).abs().max() <= 2e-5, name


# ------------------------------------------------------------------ scores

SCORE = """
import json
from pathlib import Path
import numpy as np
from htsat.training.distributed import Ranks
from htsat.evaluation.evaluate import ModelIdentity
from htsat.training import examples, recipe, start, validate
chosen = recipe.load_recipe("esc50", json.loads({settings!r}))
import torch
torch.set_num_threads(1)
ranks = Ranks()
data = examples.open_run_data(chosen, Path({data!r}), lambda line, share: None)
torch.manual_seed(5)
model = start.make_model(data.recipe, print).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
identity = ModelIdentity("run", "run", "", data.recipe.data.labels, "single_label")
found = []
for clips in (data.test, data.test[:3], data.test[:1]):
    heard = validate.listen(model, data.recipe, data, clips, ranks, "", lambda line, share: None)
    scores = validate.evaluate_clips(data.recipe, data, clips, heard, identity, "validation")
    found.append(json.dumps([scores.to_dict(), [one.posteriors.tobytes().hex() for one in heard]], sort_keys=True))
open({path!r} + str(ranks.rank), "w").write("\\n".join(found))
raise SystemExit(0)
"""


def test_scores_of_several_processes_are_those_of_one(data, tmp_path):
    """Bit by bit, where the clips cannot be dealt out evenly, and where a process gets none."""
    texts = {}
    for world in (1, 2, 3):
        source = SCORE.format(settings=json.dumps(SMALL), data=str(data), path=str(tmp_path / f"{world}-"))
        outcome = nursery().run(["train"], world=world, mishaps=dict.fromkeys(range(world), source))
        assert outcome.codes == [0] * world, outcome.errors
        ranks = {(tmp_path / f"{world}-{rank}").read_text() for rank in range(world)}
        assert len(ranks) == 1
        texts[world] = ranks.pop()
    assert texts[1] == texts[2] == texts[3]
    assert "accuracy" in texts[1]


# ------------------------------------------------------------------ what cannot be read


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory):
    """Two clips of the training folds that cannot be read."""
    root = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(data, root)
    names = sorted(path.name for path in (root / "audio").glob("[1-4]-*-A-*.wav"))[:2]
    for name in names:
        (root / "audio" / name).write_bytes(b"RIFF")
    return root, names


def test_unreadable_clips_are_listed(damaged, tmp_path):
    root, names = damaged
    settings = ("data.unreadable=0.5", "data.select=0.0", "train.select_steps=0", "train.patience=0",
                "train.steps=16", "train.save_steps=0")  # fmt: skip
    listed = {}
    for world, workers in ((1, 0), (1, 2), (2, 0)):
        out = tmp_path / f"run{world}{workers}"
        outcome = nursery().train(root, out, *settings, f"train.workers={workers}", world=world)
        assert outcome.codes == [0] * world, outcome.errors
        listed[world, workers] = (out / "unreadable.tsv").read_bytes()
        report = json.loads((out / "report.json").read_text())
        assert [name.rsplit("/", 1)[-1] for name in report["unreadable_clips"]] == names
    assert len(set(listed.values())) == 1
    lines = next(iter(listed.values())).decode().splitlines()
    assert lines[0] == "filename\treason"
    assert [line.split("\t")[0].rsplit("/", 1)[-1] for line in lines[1:]] == names


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0)])
def test_too_many_unreadable_clips(damaged, tmp_path, world, workers):
    """Every process ends, with one line that says why."""
    settings = ("data.unreadable=0.0", f"train.workers={workers}", "train.steps=16")
    outcome = nursery().train(damaged[0], tmp_path / "run", *settings, world=world, limit=60)
    assert 0 not in outcome.codes and not outcome.orphans
    for error in outcome.errors:
        lines = error.strip().splitlines()
        assert "more than the 0 that data.unreadable 0 allows" in lines[-1]
        assert "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_in_one_process(data, tmp_path, workers):
    """It comes out of a worker as the one line that it is, and the other process ends with it."""
    broken = """
from htsat.errors import DataError
from htsat.training import examples
plain = examples.ClipExamples.example
def example(self, position):
    if position == 10:
        raise DataError("the shelf fell down")
    return plain(self, position)
examples.ClipExamples.example = example
"""
    settings = (f"train.workers={workers}", "train.select_steps=0", "train.patience=0")
    outcome = nursery().train(
        data, tmp_path / "run", *settings, world=2, mishaps={0: broken, 1: broken}, limit=90
    )  # fmt: skip
    assert outcome.codes == [1, 1] and not outcome.orphans
    for error in outcome.errors:
        assert error.strip().splitlines() == ["htsat: the shelf fell down"]


FAILURES = {
    "an error": "raise ValueError('out of luck')",
    "a full disk": "raise OSError(28, 'No space left on device')",
    "an exit": "os._exit(3)",
    "a kill": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize(("failure", "rank"), [("an error", 1), ("a full disk", 0), ("a kill", 1)])
def test_a_failing_process_ends_the_others(data, tmp_path, failure, rank):
    mishap = AT_STEP.format(n=3, after=False).replace("os.kill(os.getpid(), signal.SIGKILL)", FAILURES[failure], 1)
    began = time.monotonic()
    outcome = nursery().train(data, tmp_path / "run", world=2, mishaps={rank: mishap}, limit=90)
    assert 0 not in outcome.codes and time.monotonic() - began < 90
    other = outcome.errors[1 - rank]
    assert "lost the others" in other and "Traceback" not in other, other


def test_processes_stay_together_to_their_end(data, tmp_path):
    """What an error leaves of DDP must not be the last to hold the group: it may wait for the group's thread for ever.

    That takes a thread that is late, as on a busy machine; so what is looked at is that the group is there still.
    """
    mishap = SIGNAL_AT_STEP.format(n=2, number=15)
    mishap += "\nfrom torch import distributed\nLAST.append(lambda: print(distributed.is_initialized()))"
    outcome = nursery().train(data, tmp_path / "run", world=2, mishaps={0: mishap, 1: mishap})
    assert outcome.codes == [143, 143] and outcome.outputs == ["True\n", "True\n"]


def test_the_log_cannot_be_written(data, tmp_path):
    full = """
import io
plain, lines = io.open, [0]
def open(file, mode="r", *arguments, **settings):
    lines[0] += str(file).endswith("log.jsonl") and "a" in mode
    if lines[0] == 4:
        raise OSError(28, "No space left on device")
    return plain(file, mode, *arguments, **settings)
io.open = open
"""
    outcome = nursery().train(data, tmp_path / "run", world=2, mishaps={0: full}, limit=90)
    assert outcome.codes == [1, 1]
    assert "log.jsonl: cannot be written: No space left on device" in outcome.errors[0]
    assert all("Traceback" not in error for error in outcome.errors)


def test_a_killed_worker(data, tmp_path):
    """The kernel kills the process that takes most memory: a clear end, not a page, and nothing hangs."""
    mishap = """
import os
from htsat.training import examples
plain, parent = examples.ClipExamples.example, os.getpid()
def example(self, position):
    if position == 13 and os.getpid() != parent:
        os.kill(os.getpid(), 9)
    return plain(self, position)
examples.ClipExamples.example = example
"""
    outcome = nursery().train(data, tmp_path / "run", "train.workers=2", world=2, mishaps={0: mishap, 1: mishap})
    assert outcome.codes == [1, 1] and not outcome.orphans
    assert any("a process that prepares clips ended" in error for error in outcome.errors), outcome.errors
    assert not any("Traceback" in error for error in outcome.errors), outcome.errors


def test_workers_end_with_a_killed_process(data, tmp_path):
    outcome = nursery().train(
        data, tmp_path / "run", "train.workers=2", "train.steps=500", "train.select_steps=0",
        "train.patience=0", blow=(0.0, signal.SIGKILL, [0]),
    )  # fmt: skip
    assert outcome.codes == [-signal.SIGKILL] and not outcome.orphans


# ------------------------------------------------------------------ numbers that are none

#: from the second step on, one clip is poison: its waveform, its target, or both
POISON = """
import dataclasses, math
import numpy as np
from htsat.training import examples
plain = examples.ClipExamples.example
def example(self, position):
    found = plain(self, position)
    if {when}:
        poisoned = np.array(found.{what})
        poisoned[{place}] = {value}
        found = dataclasses.replace(found, name="poisoned.wav", {what}=poisoned)
    return found
examples.ClipExamples.example = example
"""


@pytest.mark.parametrize(
    ("what", "value", "world", "precision"),
    [
        ("waveform", "math.nan", 1, "float32"),
        ("waveform", "math.inf", 2, "bfloat16"),
        ("clip_target", "math.nan", 2, "float32"),
        ("clip_target", "-math.inf", 1, "float16"),
    ],
)
def test_numbers_that_are_none_never_reach_the_weights(data, tmp_path, what, value, world, precision):
    """One poisoned clip in the last of three steps: what is saved is what the two before it left."""
    plain = ("train.select_steps=0", "train.patience=0", "train.save_steps=1", "train.schedule=constant",
             f"train.precision={precision}")  # fmt: skip
    source = POISON.format(when="position == 9", what=what, place=0, value=value)
    outcome = nursery().train(
        data, tmp_path / "run", *plain, "train.steps=3", world=world, mishaps=dict.fromkeys(range(world), source)
    )
    assert outcome.codes == [0] * world, outcome.errors
    last, before = (state_of(tmp_path / "run" / name) for name in ("state.pt", "state.previous.pt"))
    assert (last["step"], before["step"]) == (3, 2) and last["skipped"] == 1
    for part in ("model", "average", "optimiser"):
        assert differences(before[part], last[part]) == []
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "what": "loss", "clips": ["poisoned.wav"]}]
    assert "step 3: the loss is not finite, the weights are left as they were; clips: poisoned.wav" in outcome.errors[0]
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_gradient_that_is_none(data, tmp_path):
    """The loss is finite: all clips of the step are named."""
    mishap = """
import torch
from htsat.training import loop
plain, calls = torch.nn.utils.clip_grad_norm_, [0]
def clip(parameters, *arguments):
    parameters = list(parameters)
    calls[0] += 1
    if calls[0] == 2:
        parameters[3].grad.view(-1)[0] = float("inf")
    return plain(parameters, *arguments)
loop.nn.utils.clip_grad_norm_ = clip
"""
    settings = ("train.select_steps=0", "train.patience=0", "train.steps=2", "train.save_steps=1")
    outcome = nursery().train(data, tmp_path / "run", *settings, mishaps={0: mishap})
    assert outcome.codes == [0], outcome.errors
    last, before = (state_of(tmp_path / "run" / name) for name in ("state.pt", "state.previous.pt"))
    for part in ("model", "average", "optimiser"):
        assert differences(before[part], last[part]) == []
    (line,) = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert line["what"] == "gradient" and 1 <= len(line["clips"]) <= 4


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_in_a_row(data, tmp_path, world):
    source = POISON.format(when="True", what="waveform", place=0, value="math.nan")
    settings = ("train.max_skipped=2", "train.select_steps=0", "train.patience=0")
    mishaps = dict.fromkeys(range(world), source)
    outcome = nursery().train(data, tmp_path / "run", *settings, world=world, mishaps=mishaps)
    assert outcome.codes == [1] * world
    for error in outcome.errors:
        assert "step 3: the loss is not finite, as in the 2 steps before; clips: poisoned.wav" in error
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("start", [2.0**40, 2.0**-3])
def test_half_precision_overflow(data, tmp_path, start):
    """A factor that is too large is lowered, step by step; where it cannot be the cause, the steps are counted."""
    mishap = f"""
import torch
plain = torch.amp.GradScaler.__init__
def begin(self, device, enabled):
    plain(self, device, init_scale={start}, enabled=enabled)
torch.amp.GradScaler.__init__ = begin
"""
    if start < 1:
        mishap += """
from htsat.training import loop
loop.nn.utils.clip_grad_norm_ = lambda *_: torch.tensor(float("inf"))
"""
    settings = ("train.precision=float16", "train.select_steps=0", "train.patience=0", "train.steps=40",
                "train.max_skipped=3")  # fmt: skip
    outcome = nursery().train(data, tmp_path / "run", *settings, mishaps={0: mishap})
    if start < 1:
        assert outcome.codes == [1] and "step 4: the gradient is not finite" in outcome.errors[0]
        return
    assert outcome.codes == [0], outcome.errors
    state = state_of(tmp_path / "run/state.pt")
    assert 1 < state["scaler"]["scale"] < start
    steps = {float(found["step"]) for found in state["optimiser"]["state"].values()}
    assert len(steps) == 1 and 0 < steps.pop() < 40  # those that overflowed did not count
    assert not (tmp_path / "run/skipped.jsonl").exists()


# ------------------------------------------------------------------ torchrun


def command(data, out, *settings):
    given = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    return ["-m", "htsat", "train", "esc50", "--data", str(data), "--out", str(out), *given]


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_as_the_documents_say(data, tmp_path):
    """Against the processes of the other tests; ended by SIGTERM, and gone on with."""
    outcome = nursery().train(data, tmp_path / "reference", world=2)
    assert outcome.codes == [0, 0], outcome.errors
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = torchrun("--standalone", "--nproc-per-node", "2", *command(data, out))
    process = subprocess.Popen(start, env=environment)
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=300)
    subprocess.run([*start, "--resume"], check=True, timeout=600, env=environment)
    assert run_differences(tmp_path / "reference", out) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_torchrun_leaves_nothing_behind(data, tmp_path):
    out = tmp_path / "run"
    start = torchrun("--standalone", "--nproc-per-node", "2", *command(data, out, "train.steps=100000"))
    process = subprocess.Popen(start, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    until = time.monotonic() + 120
    while processes_with(str(out)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not processes_with(str(out))
    assert state_of(out / "state.pt")["step"] >= 1


def processes_with(text):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(int(entry))
    return found


HOSTS = """
set -e
ip link set lo up
ip link add here type veth peer name there
ip addr add 10.77.0.1/24 dev here
ip link set here up
unshare -n sleep 1000 &
other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link set there netns $other
nsenter -t $other -n sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev there; ip link set there up'
export OMP_NUM_THREADS=1
rendezvous="--nnodes 2 --nproc-per-node 1 --rdzv-id run --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400"
waiting=timeout=600,read_timeout=600,join_timeout=600
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hosts(data, tmp_path):
    """Two network namespaces that see each other by one cable alone, with torchrun on each."""
    probe = subprocess.run(["unshare", "-rn", "ip", "link", "add", "here", "type", "veth", "peer", "name", "there"],
                           capture_output=True, text=True)  # fmt: skip
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()[:80]}")
    outcome = nursery().train(data, tmp_path / "reference", world=2)
    assert outcome.codes == [0, 0], outcome.errors
    out = tmp_path / "run"
    script = tmp_path / "hosts.sh"
    run = " ".join(f"'{part}'" for part in command(data, out))
    begin = f"'{sys.executable}' -m torch.distributed.run $rendezvous --rdzv-conf $waiting,is_host="
    there = f"GLOO_SOCKET_IFNAME=there nsenter -t $other -n {begin}0 --local-addr 10.77.0.2 {run}"
    here = f"GLOO_SOCKET_IFNAME=here {begin}1 --local-addr 10.77.0.1 {run}"
    script.write_text(f"{HOSTS}{there} &\nnode=$!\n{here}\nwait $node\n")
    done = subprocess.run(["unshare", "-rn", "sh", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run_differences(tmp_path / "reference", out) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_processes_go_on_exactly(data, tmp_path):
    """Three sums may be added up in several orders: it must be the same one before and after."""
    settings = ("train.batch_size=6",)
    assert nursery().train(data, tmp_path / "whole", *settings, world=3).codes == [0, 0, 0]
    out = tmp_path / "run"
    mishap = AT_STEP.format(n=5, after=True)
    assert nursery().train(data, out, *settings, world=3, mishaps={1: mishap}).codes[1] == -9
    assert nursery().train(data, out, *settings, world=3, resume=True).codes == [0, 0, 0]
    assert run_differences(tmp_path / "whole", out) == []


def test_processes_with_different_data(data, tmp_path):
    """A host whose copy of the data lacks a clip."""
    mishap = """
from htsat.training import loop
loop.data_digest = lambda data: "another"
"""
    outcome = nursery().train(data, tmp_path / "run", world=2, mishaps={1: mishap})
    assert outcome.codes == [1, 1]
    assert all("the processes have different clips or labels" in error for error in outcome.errors)
