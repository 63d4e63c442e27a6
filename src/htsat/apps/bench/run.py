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
    lacking,
)
from htsat.apps.bench.files import measure_decode, measure_startup
from htsat.apps.bench.front import WAYS, FrontJob, measure_front, write_graph
from htsat.apps.bench.hardware import MatrixRate, faster, measure_rates
from htsat.apps.bench.measure import BenchError, Work, apart, doubt, has_bfloat16, load_average, machine
from htsat.apps.bench.speed import SpeedJob, SpeedRow, measure_speed
from htsat.apps.bench.subjects import FULL, Sources, Subject, full_config, prepare
from htsat.apps.bench.training import NETWORKS, measure_training
from htsat.backends import REMEDIES, Precision, has_package, installed, usable
from htsat.config import CheckpointConfig
from htsat.errors import HtsatError, UsageError
from htsat.model.exported import SUFFIX, read_model_config
from htsat.model.hub import bundled_export, resolve

#: what can be measured
WHAT = ("speed", "front", "training", "startup", "decode")
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
            rates = self._rates()
            jobs = [SpeedJob(c, subjects.get(c.subject), settings.threads, classes) for c in found]
            rows = measure_speed(jobs, settings.batches, settings.rounds, self.progress, self.fail)
            rates = faster(rates, self._rates())
        lengths = {subject.seconds for subject in subjects.values()}
        best = {rate.precision: rate.best for rate in rates}
        by_name = {candidate.name: candidate for candidate in found}

        def share(row: SpeedRow) -> float | None:
            """Return how much of the time a network would take anyway, as matrices are multiplied no faster."""
            candidate = by_name[row.candidate]
            flops = sizes[_network(candidate)][1]
            limit = best.get("float32" if candidate.is_float32 else "bfloat16")
            return None if flops is None or limit is None else 1000 * flops / limit / row.median_ms

        return {
            "seconds": {name: subject.seconds for name, subject in subjects.items()},
            "unit": f"{max(lengths, default=10.0):g}-s clip",
            "matrix_rates": [dataclasses.asdict(rate) for rate in rates],
            "networks": [
                {
                    "network": name,
                    "parameters": parameters,
                    "flops": flops,
                    "floor_ms": {} if flops is None else {key: 1000 * flops / limit for key, limit in best.items()},
                }
                for name, (parameters, flops) in sizes.items()
            ],
            "rows": [dataclasses.asdict(row) | {"matrix_share": share(row)} for row in rows],
        }

    def _rates(self) -> list[MatrixRate]:
        """Return how fast matrices are multiplied; nothing where there is no PyTorch to do it."""
        if not has_package("torch"):
            self.leave_out("matrix products", "torch is not installed, so nothing is said of the hardware's limit")
            return []
        self.progress("multiplying matrices", 0.0)
        precisions: tuple[Precision, ...] = ("float32", "bfloat16") if has_bfloat16() else ("float32",)
        return apart("matrix products", measure_rates, self.settings.threads, precisions)

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

    def _sizes(
        self, found: Sequence[Candidate], subjects: dict[str, Subject], classes: int
    ) -> dict[str, tuple[int, int | None]]:
        """Return parameters and operations by ``_network``."""
        sizes: dict[str, tuple[int, int | None]] = {}
        for candidate in found:
            name = _network(candidate)
            if candidate.kind in BASELINES:
                self.progress(f"counting {candidate.name}", 0.0)
                sizes[name] = apart(candidate.name, _baseline_size, candidate.kind, classes)
                continue
            subject = subjects[candidate.subject]
            if candidate.kind != "plain":
                sizes[name] = (subject.parameters, subject.flops)
            elif subject.plain_size is not None:
                sizes[name] = subject.plain_size
        return sizes

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

    def front(self) -> dict[str, Any]:
        settings = self.settings
        config = self._config(FULL if settings.model is None else settings.model)
        exports = all(map(has_package, ("torch", "onnx", "onnxscript")))
        ways = []
        for way in WAYS:
            package = way if way in ("onnxruntime", "openvino") else "torch"
            if not has_package(package):
                self.leave_out(f"front end, {way}", f"{package} is not installed: pip install {REMEDIES[package]}")
            elif package != "torch" and not exports:
                self.leave_out(f"front end, {way}", f"export needs other packages: pip install {REMEDIES['onnx']}")
            else:
                ways.append(way)
        with tempfile.TemporaryDirectory(prefix="htsat-bench-") as folder:
            graph = Path(folder) / "front.onnx"
            if exports:
                self.progress("exporting the front end", 0.0)
                apart("exporting the front end", write_graph, config.frontend, config.heard_samples, graph)
            jobs = [FrontJob(way, config.frontend, config.heard_samples, settings.threads, graph) for way in ways]
            rows = measure_front(jobs, settings.rounds, self.progress, self.fail)
        unit = f"{config.heard_samples / config.frontend.sample_rate:g}-s clip"
        return {"unit": unit, "rows": [dataclasses.asdict(row) for row in rows]}

    def startup(self) -> list[dict[str, Any]]:
        backends = [name for name in usable(BUNDLED, resolve(BUNDLED)) if name != "compiled"]
        rows = measure_startup(backends, has_package("torch"), self.settings.rounds, self.progress)
        return [dataclasses.asdict(row) for row in rows]

    def decode(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(row) for row in measure_decode(self.settings.rounds, self.progress)]


def _network(candidate: Candidate) -> str:
    """Return the name of the network that a candidate runs, as tables show it."""
    if candidate.kind in BASELINES:
        return candidate.name
    if candidate.kind == "plain":
        return "plain HTS-AT"
    return "htsat" if candidate.subject == FULL else f"htsat, {candidate.subject}"


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
