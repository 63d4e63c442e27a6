"""Interrupts trainings in every way it knows, resumes them, and counts which end as if nothing had happened.

    python benchmarks/interruptions.py [--minutes 5] [--seed 0] [--kinds step line ...] [--json FILE] [--keep]

A training in miniature (eight steps, selection, averages of the best, early stopping) runs to its end; the same
training is then interrupted at a random point, as often as chance has it more than once, resumed, and compared with
the first one bit by bit: weights, optimiser, averages, scaler, log, scores, candidates, finished checkpoint. Kinds:

* step: ``kill -9`` right before or after the weights of a step move;
* line: ``kill -9`` before a random line of Python that writes a file of the run (states, candidates, logs, result);
* time: ``kill -9`` from outside, a random time after the first step;
* SIGTERM, SIGINT: from outside, likewise; the exit code must be 143 or 130 where the run was not done yet, and the
  state that it says is saved must load;
* full disk: a random write, sync or renaming of a state fails; the command must end with an error, one that does not
  say "saved";
* damage: a bit of the newest state is turned over after ``kill -9`` at a random step.

Precision (float32, bfloat16, float16), worker processes (0, 2) and training processes (1, 2; one of them is killed, or
all) are drawn anew each time. Runs are forked from a process that has imported everything, see ``tests/trainings.py``.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from miniature_corpora import make_esc50  # noqa: E402
from trainings import AT_LINE, AT_STEP, COUNT_LINES, Nursery, Outcome, run_differences, state_of  # noqa: E402

KINDS = ("step", "line", "time", "SIGTERM", "SIGINT", "full disk", "damage")
STEPS = 8
#: lets the ``{n}``-th call that changes a state's files fail
FULL_DISK = """
import os
from htsat.training import runfolder
calls = [0]
def failing(plain):
    def call(*arguments, **settings):
        calls[0] += 1
        if calls[0] == {n}:
            raise OSError(28, "No space left on device")
        return plain(*arguments, **settings)
    return call
save = runfolder.RunFolder.save_state
def save_state(self, state):
    kept = os.fsync, os.replace
    os.fsync, os.replace = failing(os.fsync), failing(os.replace)
    try:
        save(self, state)
    finally:
        os.fsync, os.replace = kept
runfolder.RunFolder.save_state = save_state
"""


class Count:
    """What became of the runs of one kind."""

    def __init__(self) -> None:
        self.runs = self.kills = self.identical = self.different = self.wrong = 0


class Matrix:
    """Draws interruptions, and keeps the counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        from htsat.labels import label_set

        self.folder, self.random = folder, random.Random(seed)
        self.data = make_esc50(folder / "data", seconds=0.5, labels=label_set("esc50")[:4])
        self.nursery = Nursery()
        self.counts: dict[str, Count] = collections.defaultdict(Count)
        self.settings: dict[str, int] = collections.Counter()
        self.problems: list[str] = []
        self._references: dict[tuple[str, int], tuple[Path, int, float]] = {}

    def reference(self, precision: str, world: int) -> tuple[Path, int, float]:
        """Return an uninterrupted run, the number of its lines that write files, and its seconds."""
        key = precision, world
        if key not in self._references:
            out = self.folder / f"reference-{precision}-{world}"
            counted = self.folder / "lines"
            mishap = COUNT_LINES.format(n=0, path=str(counted))
            outcome = self.nursery.train(
                self.data, out, f"train.precision={precision}", world=world, mishaps={0: mishap}, limit=600
            )
            if outcome.codes != [0] * world:
                raise SystemExit(f"the uninterrupted run failed: {outcome.errors}")
            self._references[key] = out, int(counted.read_text()), outcome.seconds
        return self._references[key]

    def one(self, kind: str, number: int) -> None:
        """Interrupt a training once or more, resume it and compare."""
        choose = self.random
        precision = choose.choice(("float32", "float32", "bfloat16", "float16"))
        world, workers = choose.choice((1, 1, 2)), choose.choice((0, 2))
        reference, lines, seconds = self.reference(precision, world)
        out, count = self.folder / f"run{number}", self.counts[kind]
        settings = (f"train.precision={precision}", f"train.workers={workers}")
        self.settings[f"{precision}, {workers} workers, {world} processes"] += 1
        count.runs += 1
        told = f"{kind}, {precision}, {workers} workers, {world} processes"
        times = 1 + (choose.random() < 0.3)
        for _ in range(times):
            ranks = choose.choice((tuple(range(world)), (choose.randrange(world),)))
            mishaps, blow, before = {}, None, len(self.problems)
            if kind in ("step", "damage"):
                where = AT_STEP.format(n=choose.randint(1, STEPS), after=choose.random() < 0.5)
                mishaps = dict.fromkeys(ranks, where)
            elif kind == "line":
                mishaps = {0: AT_LINE.format(n=choose.randint(1, lines))}
            elif kind == "full disk":
                mishaps = {0: FULL_DISK.format(n=choose.randint(1, 18))}
            else:
                name = signal.SIGKILL if kind == "time" else signal.Signals[kind]
                # Soon, mostly: what comes before the first step takes most of the seconds.
                blow = (seconds * choose.random() ** 3, int(name), ranks)
            outcome = self.nursery.train(
                self.data, out, *settings, resume=(out / "recipe.json").exists(), world=world,
                mishaps=mishaps, blow=blow, limit=600,
            )  # fmt: skip
            self._judge(kind, out, outcome, told)
            if len(self.problems) > before:
                count.wrong += 1
            count.kills += any(outcome.codes)
            if kind == "damage" and all((out / name).exists() for name in ("state.pt", "state.previous.pt")):
                content = bytearray((out / "state.pt").read_bytes())
                content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
                (out / "state.pt").write_bytes(content)
        outcome = self.nursery.train(
            self.data, out, *settings, resume=(out / "recipe.json").exists(), world=world, limit=600
        )
        found = [f"exit codes {outcome.codes}: {outcome.errors}"] if any(outcome.codes) else []
        found = found or run_differences(reference, out)
        if found:
            count.different += 1
            self.problems.append(f"{told}: {'; '.join(found[:5])}")
        else:
            count.identical += 1
            shutil.rmtree(out)

    def _judge(self, kind: str, out: Path, outcome: Outcome, told: str) -> None:
        """Note what an interrupted run did that it must not do."""
        if outcome.orphans:
            self.problems.append(f"{told}: processes are left behind")
        if any("Traceback" in error for error in outcome.errors):
            self.problems.append(f"{told}: {outcome.errors}")
        for name in ("state.pt", "state.previous.pt"):
            if kind != "damage" and (out / name).exists():
                state_of(out / name)
        if kind in ("SIGTERM", "SIGINT") and any(outcome.codes):
            number = int(signal.Signals[kind])
            # Before the loop and behind it, where nothing is left to save, the signal ends the process itself.
            if not set(outcome.codes) <= {128 + number, -number, 1, 0}:
                self.problems.append(f"{told}: exit codes {outcome.codes}: {outcome.errors}")
            if 128 + number in outcome.codes and not (out / "state.pt").exists():
                self.problems.append(f"{told}: says that the state is saved, and there is none")
        if kind == "full disk" and any(outcome.codes) and "is saved" in outcome.errors[0]:
            self.problems.append(f"{told}: {outcome.errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write the counts there, too")
    parser.add_argument("--keep", action="store_true", help="keep the run folders, those that differ at least")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="interruptions-"))
    matrix = Matrix(folder, options.seed)
    until, number = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < until:
        kind = options.kinds[number % len(options.kinds)]
        try:
            matrix.one(kind, number)
        except AssertionError as error:  # it hangs, or a state is damaged
            matrix.counts[kind].different += 1
            matrix.problems.append(f"{kind}: {error}")
        number += 1
    matrix.nursery.close()

    columns = ("runs", "kills", "identical", "different", "wrong")
    print(f"{'kind':<12}" + "".join(f"{name:>12}" for name in columns))
    total = Count()
    for kind, count in matrix.counts.items():
        print(f"{kind:<12}" + "".join(f"{getattr(count, name):>12}" for name in columns))
        for name in columns:
            setattr(total, name, getattr(total, name) + getattr(count, name))
    print(f"{'all':<12}" + "".join(f"{getattr(total, name):>12}" for name in columns))
    print("kills: interruptions that took place; wrong: those that left processes, a traceback or a false word")
    for setting, runs in sorted(matrix.settings.items()):
        print(f"  {runs:4} x {setting}")
    for problem in matrix.problems:
        print(problem, file=sys.stderr)
    if options.json:
        report = {"counts": {kind: vars(count) for kind, count in matrix.counts.items()}, "settings": matrix.settings,
                  "problems": matrix.problems}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.keep:
        print(f"the run folders lie in {folder}")
    else:
        shutil.rmtree(folder)
    raise SystemExit(bool(matrix.problems))


if __name__ == "__main__":
    main()
