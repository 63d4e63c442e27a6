"""One run of ``htsat bench``: what is to be measured, what can be, and all figures together."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from htsat.apps.bench.candidates import (
    BASELINES,
    BUNDLED,
    USUAL,
    USUAL_OF_MODEL,
    Candidate,
    check,
    choose,
    is_installed,
    lacking,
)
from htsat.apps.bench.files import measure_decode, measure_startup
from htsat.apps.bench.measure import BenchError, Work, apart, doubt, load_average, machine
from htsat.apps.bench.speed import SpeedJob, measure_speed
from htsat.apps.bench.subjects import FULL, Sources, Subject, full_config, prepare
from htsat.apps.bench.training import NETWORKS, measure_training
from htsat.backends import installed, usable
from htsat.config import CheckpointConfig
from htsat.errors import HtsatError, UsageError
from htsat.model.exported import SUFFIX, read_model_config
from htsat.model.hub import bundled_export, resolve

#: what can be measured
WHAT = ("speed", "training", "startup", "decode")
#: number of the JSON's format
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What is to be measured.

    Attributes:
        what: of ``WHAT``.
        names: of the candidates; empty: the usual ones.
        batches: clips in a call; a training step takes the largest.
        threads: of the CPU.
        rounds: that are timed; None: a few, fewer of what is slow.
        model: a name, a checkpoint or an exported file to measure instead of the network of published size.
        full: that network.
    """

    what: tuple[str, ...]
    names: tuple[str, ...]
    batches: tuple[int, ...]
    threads: int
    rounds: int | None = None
    model: str | None = None
    full: CheckpointConfig = field(default_factory=full_config)

    def __post_init__(self) -> None:
        check(self.what, WHAT, "measurement")
        choose(self.names, "")
        if not self.what:
            raise UsageError(f"nothing is to be measured; expected some of {', '.join(WHAT)}")
        if not self.batches or min(self.batches) < 1 or max(self.batches) > 1024:
            raise UsageError("batches must be numbers from 1 to 1024")


class _Run:
    """Collects what is left out and what fails."""

    def __init__(
        self, settings: Settings, on_progress: Callable[[str, float], None], on_note: Callable[[str], None]
    ) -> None:
        self.settings, self.progress, self.note = settings, on_progress, on_note
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def leave_out(self, name: str, reason: str) -> None:
        if name not in self.left_out:
            self.left_out[name] = reason
            self.note(f"{name} is left out: {reason}")

    def fail(self, name: str, error: HtsatError) -> None:
        if isinstance(error, UsageError):  # it is not installed, or the processor cannot
            self.leave_out(name, str(error))
            return
        self.failed[name] = str(error)
        self.note(str(error))

    # -------------------------------------------------------------- speed

    def speed(self) -> dict[str, Any]:
        settings = self.settings
        main = FULL if settings.model is None else settings.model
        names = settings.names or (USUAL if settings.model is None else USUAL_OF_MODEL)
        found = [candidate for candidate in choose(names, main) if self._can(candidate)]
        if not found:
            raise UsageError("none of the candidates can be run here; see what is left out, and why")
        with tempfile.TemporaryDirectory(prefix="htsat-bench-") as folder:
            subjects = {
                name: self._prepared(name, [c for c in found if c.subject == name], Path(folder))
                for name in dict.fromkeys(c.subject for c in found if c.kind not in BASELINES)
            }
            classes = settings.full.model.num_classes
            sizes = self._sizes(found, subjects, classes)
            jobs = [SpeedJob(c, subjects.get(c.subject), settings.threads, classes) for c in found]
            rows = measure_speed(jobs, settings.batches, settings.rounds, self.progress, self.fail)
        lengths = {subject.seconds for subject in subjects.values()}
        return {
            "seconds": {name: subject.seconds for name, subject in subjects.items()},
            "unit": f"{max(lengths, default=10.0):g}-s clip",
            "networks": sizes,
            "rows": [dataclasses.asdict(row) for row in rows],
        }

    def _sources(self, name: str) -> Sources:
        if name == FULL:
            return Sources(name, None, None)
        path = resolve(name)
        if path.suffix == SUFFIX:
            return Sources("model" if name != BUNDLED else name, None, path)
        return Sources("model" if name != BUNDLED else name, path, bundled_export(name))

    def _config(self, name: str) -> CheckpointConfig:
        """Return the configuration of a network.

        Raises:
            UsageError: it has no classes, hence no posteriors.
        """
        sources = self._sources(name)
        path = sources.checkpoint or sources.export
        config = self.settings.full if path is None else read_model_config(path)
        if not config.labels:
            raise UsageError(f"model {name!r} has no classes, it gives embeddings only; choose another (htsat models)")
        return config

    def _can(self, candidate: Candidate) -> bool:
        if candidate.kind in BASELINES:
            reason = lacking(candidate, False, False)
        else:
            sources = self._sources(candidate.subject)
            is_random = candidate.subject == FULL
            reason = lacking(candidate, is_random or sources.checkpoint is not None, sources.export is not None)
            if reason is None and candidate.kind == "plain":
                reason = self._unplain(candidate.subject)
        if reason is not None:
            self.leave_out(candidate.name, reason)
        return reason is None

    def _unplain(self, name: str) -> str | None:
        """Return why a network cannot be written plainly."""
        from htsat.apps.bench.plain import unlike

        config = self._config(name)
        reason = unlike(config.frontend, config.model)
        if reason is None and config.heard_samples != config.chunk_samples:
            reason = "hears a part of a chunk at once"
        return None if reason is None else f"it is the published network written plainly, and this model {reason}"

    def _prepared(self, name: str, candidates: Sequence[Candidate], folder: Path) -> Subject:
        self._config(name)
        sources = self._sources(name)
        exports = any(candidate.is_exported for candidate in candidates)
        if exports and sources.export is None:
            self.note("exporting the network for the runtimes that need it; this takes up to a minute")
        self.progress(f"preparing {name}", 0.0)
        plain = any(candidate.kind == "plain" for candidate in candidates)
        if sources.checkpoint is not None and sources.export is not None and not installed("torch"):
            sources = dataclasses.replace(sources, checkpoint=None)
        return apart(f"preparing {name}", prepare, sources, folder, exports, plain, self.settings.full)

    def _sizes(self, found: Sequence[Candidate], subjects: dict[str, Subject], classes: int) -> list[dict[str, Any]]:
        sizes: dict[str, tuple[int, int | None]] = {}
        for name, subject in subjects.items():
            if subject.plain_size is not None:
                sizes["plain HTS-AT"] = subject.plain_size
            sizes["htsat" if name == FULL else f"htsat, {name}"] = (subject.parameters, subject.flops)
        for candidate in found:
            if candidate.kind in BASELINES:
                self.progress(f"counting {candidate.name}", 0.0)
                sizes[candidate.name] = apart(candidate.name, _baseline_size, candidate.kind, classes)
        return [{"network": n, "parameters": count, "flops": flops} for n, (count, flops) in sizes.items()]

    # -------------------------------------------------------------- the others

    def training(self) -> dict[str, Any]:
        settings = self.settings
        main = FULL if settings.model is None else settings.model
        names = [name for name in NETWORKS if not settings.names or name in settings.names]
        found = [candidate.kind for candidate in choose(names, main) if self._can(candidate)]
        if not found:
            raise UsageError(f"nothing to train: choose among {', '.join(NETWORKS)}, which need 'htsat[bench]'")
        config = self._config(main)
        rows = measure_training(
            found, max(settings.batches), settings.rounds, settings.threads, self.progress, self.fail, config
        )
        unit = f"{config.model.chunk_seconds:g}-s clip"
        return {"unit": unit, "rows": [dataclasses.asdict(row) for row in rows]}

    def startup(self) -> list[dict[str, Any]]:
        backends = [name for name in usable(BUNDLED, resolve(BUNDLED)) if name != "compiled"]
        rows = measure_startup(backends, is_installed("torch"), self.settings.rounds, self.progress)
        return [dataclasses.asdict(row) for row in rows]

    def decode(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(row) for row in measure_decode(self.settings.rounds, self.progress)]


def _baseline_size(name: str, classes: int) -> tuple[int, int]:
    from htsat.apps.bench.baselines import baseline_size

    return baseline_size(name, classes)


def run(
    settings: Settings, on_progress: Callable[[str, float], None], on_note: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and return all figures, as they go into JSON.

    Args:
        settings: what is to be measured.
        on_progress: told what happens, and the share of it that is done.
        on_note: told in a line what is left out, what failed, and what to doubt.

    Raises:
        UsageError: nothing of it can be measured here.
        CheckpointError, DownloadError: the model cannot be had.
    """
    collected = _Run(settings, on_progress, on_note)
    before, load_before = Work.now(), load_average()
    result: dict[str, Any] = {"format": FORMAT, "machine": machine(settings.threads)}
    for name in WHAT:
        if name not in settings.what:
            continue
        try:
            result[name] = getattr(collected, name)()
        except BenchError as error:  # the other measurements are not lost
            collected.fail(name, error)
    others = before.others(Work.now())
    result["left_out"], result["failed"] = collected.left_out, collected.failed
    result["load"] = {
        "before": load_before,
        "after": load_average(),
        "share_of_others": others,
        "trusted": None if others is None else doubt(others) is None,
    }
    return result
