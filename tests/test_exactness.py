"""A run that was ended in whatever way and resumed ends as the one that never was: bit by bit.

Each training here is a process of its own (``trainings.py``). What is compared: weights, optimiser, average, scaler,
log, scores, candidates and the finished checkpoint.
"""

import json
import random
import signal
from pathlib import Path

import pytest
from miniature_corpora import make_esc50
from trainings import AT_LINE, AT_STEP, COUNT_LINES, SIGNAL_AT_STEP, nursery, run_differences, state_of

from htsat.labels import label_set

STEPS = 8
BF16, FP16 = "train.precision=bfloat16", "train.precision=float16"
#: what changes nothing but who prepares the clips
WORKERS = "train.workers=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("data"), seconds=0.5, labels=label_set("esc50")[:4])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(settings, processes) -> the folder of a run that nothing interrupted."""
    made: dict[tuple, Path] = {}

    def run(*settings, world=1):
        if (settings, world) not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            outcome = nursery().train(data, out, *settings, world=world)
            assert outcome.codes == [0] * world, outcome.errors
            made[settings, world] = out
        return made[settings, world]

    return run


def go_on(data, out, *settings, world=1):
    outcome = nursery().train(data, out, *settings, resume=True, world=world)
    assert outcome.codes == [0] * world, outcome.errors
    assert not outcome.orphans


QUICK = [
    ((), (WORKERS,), 1, (0,), 4, False),
    ((BF16,), (), 1, (0,), 6, True),
    ((), (), 2, (1,), 5, False),
]
THOROUGH = [
    (precision, workers, world, ranks, step, after)
    for precision in ((), (BF16,), (FP16,))
    for workers in ((), (WORKERS,))
    for world, ranks in ((1, (0,)), (2, (0,)), (2, (1,)), (2, (0, 1)), (3, (2,)))
    for step, after in ((1, False), (random.Random(world).randint(2, STEPS - 1), True), (STEPS, True))
]


def check_kill(data, whole, tmp_path, precision, workers, world, ranks, step, after):
    precision = (*precision, "train.batch_size=6") if world == 3 else precision
    reference = whole(*precision, world=world)
    out = tmp_path / "run"
    mishap = AT_STEP.format(n=step, after=after)
    outcome = nursery().train(
        data, out, *precision, *workers, world=world, mishaps=dict.fromkeys(ranks, mishap), limit=200
    )
    assert all(outcome.codes[rank] == -signal.SIGKILL for rank in ranks)
    assert 0 not in outcome.codes, "a process believes that all is well"
    assert not outcome.orphans
    assert not any("Traceback" in error for error in outcome.errors), outcome.errors
    go_on(data, out, *precision, *workers, world=world)
    assert run_differences(reference, out) == []


@pytest.mark.parametrize(("precision", "workers", "world", "ranks", "step", "after"), QUICK)
def test_killed_at_a_step(data, whole, tmp_path, precision, workers, world, ranks, step, after):
    check_kill(data, whole, tmp_path, precision, workers, world, ranks, step, after)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("precision", "workers", "world", "ranks", "step", "after"), THOROUGH)
def test_killed_at_any_step(data, whole, tmp_path, precision, workers, world, ranks, step, after):
    check_kill(data, whole, tmp_path, precision, workers, world, ranks, step, after)


def count_lines(data, tmp_path):
    """Return how many lines of Python write the files of a run."""
    counted = tmp_path / "lines"
    outcome = nursery().train(data, tmp_path / "counted", mishaps={0: COUNT_LINES.format(n=0, path=str(counted))})
    assert outcome.codes == [0], outcome.errors
    return int(counted.read_text())


def check_lines(data, whole, tmp_path, numbers):
    for number in numbers:
        out = tmp_path / f"line{number}"
        outcome = nursery().train(data, out, mishaps={0: AT_LINE.format(n=number)})
        assert outcome.codes == [-signal.SIGKILL]
        if not (out / "recipe.json").exists():  # not begun: the same command begins it
            assert nursery().train(data, out).codes == [0]
        else:
            go_on(data, out)
        assert run_differences(whole(), out) == [], number


def test_killed_while_files_are_written(data, whole, tmp_path):
    lines = count_lines(data, tmp_path)
    assert lines > 200
    check_lines(data, whole, tmp_path, sorted(random.Random(3).sample(range(1, lines + 1), 2)))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_any_line_that_writes_a_file(data, whole, tmp_path):
    check_lines(data, whole, tmp_path, range(1, count_lines(data, tmp_path) + 1))


@pytest.mark.parametrize(
    ("number", "world", "settings", "code"),
    [(signal.SIGTERM, 1, (WORKERS,), 143), (signal.SIGINT, 2, (), 130)],
)
def test_signals_save_at_that_step(data, whole, tmp_path, number, world, settings, code):
    """Sent to one rank as ``torchrun`` would, in the middle of the fifth step; none of them goes on."""
    out = tmp_path / "run"
    mishap = SIGNAL_AT_STEP.format(n=5, number=int(number))
    outcome = nursery().train(data, out, *settings, world=world, mishaps={world - 1: mishap})
    assert outcome.codes == [code] * world, outcome.errors
    assert not outcome.orphans
    assert state_of(out / "state.pt")["step"] == 5
    assert all("the state is saved, pass --resume" in error for error in outcome.errors)
    assert not (out / "model.safetensors").exists()
    go_on(data, out, *settings, world=world)
    assert run_differences(whole(world=world), out) == []


def test_a_signal_to_the_whole_group_spares_the_workers(data, whole, tmp_path):
    """As Ctrl-C in a terminal and batch systems send it: the processes that prepare clips get it, too."""
    out = tmp_path / "run"
    mishap = SIGNAL_AT_STEP.format(n=3, number=15).replace("os.kill(os.getpid()", "os.killpg(os.getpid()")
    outcome = nursery().train(data, out, WORKERS, mishaps={0: mishap})
    assert outcome.codes == [143], outcome.errors
    assert not outcome.orphans
    assert state_of(out / "state.pt")["step"] == 3
    go_on(data, out, WORKERS)
    assert run_differences(whole(), out) == []


#: a signal right after the processes have told each other that there is none
LATE_SIGNAL = """
import os
from htsat.training import loop
plain, calls = loop._Run._asked, [0]
def asked(self, saved):
    found = plain(self, saved)
    calls[0] += 1
    if calls[0] == 4:
        os.kill(os.getpid(), 15)
    return found
loop._Run._asked = asked
"""


def test_a_signal_between_steps_is_answered_at_the_next(data, tmp_path):
    """It must neither end the run without a save nor end one process alone."""
    out = tmp_path / "run"
    outcome = nursery().train(data, out, world=2, mishaps={1: LATE_SIGNAL})
    assert outcome.codes == [143, 143], outcome.errors
    assert state_of(out / "state.pt")["step"] == 5


def test_damaged_newest_state(data, whole, tmp_path):
    """The one before is gone back to, with the candidates that it knows; and stays until another whole one is there."""
    out = tmp_path / "run"
    outcome = nursery().train(data, out, mishaps={0: AT_STEP.format(n=7, after=True)})
    assert outcome.codes == [-signal.SIGKILL]
    assert [state_of(out / name)["step"] for name in ("state.previous.pt", "state.pt")] == [3, 6]
    content = bytearray((out / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "state.pt").write_bytes(content)
    outcome = nursery().train(data, out, resume=True, mishaps={0: AT_STEP.format(n=1, after=True)})
    assert outcome.codes == [-signal.SIGKILL]
    assert state_of(out / "state.pt")["step"] == 3
    go_on(data, out)
    assert run_differences(whole(), out) == []


def test_a_damaged_last_state_of_a_finished_run(data, whole, tmp_path):
    """Its reserve names candidates that the last state no longer needed."""
    settings = ("train.keep_best=1", "train.select_steps=1", "train.save_steps=1", "train.learning_rate=0.01")
    reference = whole(*settings)
    out = tmp_path / "run"
    assert nursery().train(data, out, *settings).codes == [0]
    (out / "state.pt").write_bytes(b"htsat state 1\n")
    go_on(data, out, *settings)
    assert run_differences(reference, out) == []


def test_killed_while_it_is_scored(data, whole, tmp_path):
    out = tmp_path / "run"
    mishap = "import os\nfrom htsat.training import loop\nloop._Run._finish = lambda *_: os.kill(os.getpid(), 9)"
    assert nursery().train(data, out, mishaps={0: mishap}).codes == [-9]
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == STEPS
    go_on(data, out)
    assert run_differences(whole(), out) == []
