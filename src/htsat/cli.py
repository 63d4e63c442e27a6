"""The ``htsat`` command.

Results go to stdout, progress and errors to stderr. Exit codes: 0 every input succeeded, 1 some
failed (each is named), 2 wrong usage, 130 interrupted. Every expected failure is one line. Nothing
heavy is imported until a command needs it.
"""

import contextlib
import functools
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat import __version__
from htsat.commands.bench import bench
from htsat.commands.calibrate import calibrate
from htsat.commands.console import Progress, tell
from htsat.commands.data import DataCommand, data
from htsat.commands.evaluate import Classes, evaluate
from htsat.commands.listen import listen
from htsat.commands.score import score
from htsat.commands.serve import serve
from htsat.commands.train import train
from htsat.errors import AudioError, ConfigError, HtsatError, OutputError, UsageError

if TYPE_CHECKING:
    from htsat.config import DecodingConfig
    from htsat.formats import Detections
    from htsat.predict import Prediction, Predictor

app = typer.Typer(
    name="htsat",
    help="Name what sounds in a recording, and say when. Start with: htsat detect RECORDING",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class EventFormat(StrEnum):
    """Formats of ``htsat detect``."""

    table = "table"
    tsv = "tsv"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    audacity = "audacity"
    raven = "raven"
    webvtt = "webvtt"
    textgrid = "textgrid"


class Short(StrEnum):
    """What follows a recording shorter than a chunk."""

    pad = "pad"
    tile = "tile"
    native = "native"


class Decision(StrEnum):
    """How a CNN14 of PANNs decides on a clip."""

    max = "max"
    clip = "clip"


class BackendChoice(StrEnum):
    """What runs the network."""

    auto = "auto"
    torch = "torch"
    compiled = "compiled"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class PrecisionChoice(StrEnum):
    """Of the network."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Pooling(StrEnum):
    """How clip posteriors of several chunks become one."""

    max = "max"
    mean = "mean"
    top = "top"


Inputs = Annotated[
    list[str],
    typer.Argument(metavar="FILE|FOLDER...", help="Recordings, folders of recordings, patterns, or - for stdin."),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A name (see htsat models), a checkpoint, an exported model, or hf://owner/repo."
    ),
]
BackendOption = Annotated[
    BackendChoice | None,
    typer.Option(
        "--backend",
        help="What runs the network; auto tells which it takes.",
        show_default="the fastest that is installed and can",
    ),
]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option("--precision", help="Of the network; bfloat16 is for torch, compiled and openvino."),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="one for each core")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Recordings at once; they share the threads.",
        show_default="one for each core; 1 with PyTorch",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="10-second chunks per pass of the network.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloaded models are kept; also HTSAT_CACHE.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of the model hub; also HTSAT_ENDPOINT.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never download; also HTSAT_OFFLINE=1.")]
ShortOption = Annotated[
    Short | None,
    typer.Option(help="Recordings under 10 s: followed by silence, repeated, or alone.", show_default="the model's"),
]
Truncated = Annotated[bool, typer.Option("--allow-truncated", help="Use what is left of truncated recordings.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"htsat {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


@app.command()
def tag(
    inputs: Inputs,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Tags per recording.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: filename, label, probability.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result to a file.")] = None,
    model: Model = "default",
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="Recordings over 10 s: pool their chunks by this rule.", show_default="the model's"),
    ] = None,
    short: ShortOption = None,
    backend: BackendOption = None,
    precision: PrecisionOption = PrecisionChoice.float32,
    device: Device = "auto",
    threads: Threads = None,
    jobs: Jobs = None,
    batch_size: BatchSize = 4,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
    allow_truncated: Truncated = False,
) -> None:
    """Say what sounds in each recording: its most probable labels."""
    from htsat.files import write_atomic
    from htsat.formats import format_tags

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other; give one")
    format = "json" if as_json else "csv" if as_csv else "table"
    run = _Run(inputs)
    if out is not None:
        run.check_target(out)
    predictor = _predictor(
        model,
        backend,
        precision,
        device,
        threads,
        jobs,
        run.count,
        batch_size,
        cache_dir,
        endpoint,
        offline,
        short,
        pooling,
        1,
    )
    results = []
    with run:
        try:
            for _, prediction in run.predictions(predictor, spectrogram=False, allow_truncated=allow_truncated):
                if format == "table" and out is None:
                    run.show(format_tags([prediction.top_tags(top)], "table"))
                else:
                    results.append(prediction.top_tags(top))
        finally:  # also when interrupted: what is done is not lost
            if out is not None:
                run.write(out, lambda path: write_atomic(path, format_tags(results, format)))
            elif format != "table":
                run.show(format_tags(results, format))


@app.command()
def detect(
    inputs: Inputs,
    format: Annotated[EventFormat, typer.Option("--format", "-f", help="Format of the result.")] = EventFormat.table,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one file per recording into this folder.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG|DIR", help="Draw spectrogram, events and posteriors; a folder for several recordings."
        ),
    ] = None,
    model: Model = "default",
    operating_point: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings that the model has by name: high_precision, balanced, high_recall (see htsat calibrate).",
            show_default="the model's",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Posterior that an event must reach.", show_default="the model's")
    ] = None,
    threshold_off: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Posterior down to which it goes on.", show_default="the model's, or --threshold"
        ),
    ] = None,
    median: Annotated[
        float | None, typer.Option(min=0, max=60, help="Seconds of median filter.", show_default="the model's")
    ] = None,
    min_duration: Annotated[
        float | None, typer.Option(min=0, max=600, help="Drop shorter events (s).", show_default="the model's")
    ] = None,
    min_gap: Annotated[
        float | None,
        typer.Option(min=0, max=600, help="Join events with smaller gaps (s).", show_default="the model's"),
    ] = None,
    shifts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=32,
            help="Hear each chunk so often, moved by parts of a time step: finer times, as much slower.",
            show_default="the model's",
        ),
    ] = None,
    classes: Annotated[
        Classes | None,
        typer.Option(
            help="Count AudioSet's classes as DESED's ten: by meaning, or by the published map.",
            show_default="the model's",
        ),
    ] = None,
    short: ShortOption = None,
    backend: BackendOption = None,
    precision: PrecisionOption = PrecisionChoice.float32,
    device: Device = "auto",
    threads: Threads = None,
    jobs: Jobs = None,
    batch_size: BatchSize = 4,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
    allow_truncated: Truncated = False,
) -> None:
    """Say what sounds when in each recording: events with onset and offset in seconds."""
    import dataclasses

    from htsat.formats import FORMATS, format_events
    from htsat.plot import PICTURE_ENDINGS

    name = str(format)
    ending = (FORMATS[name].endings or (".txt",))[0]
    run = _Run(inputs)
    if FORMATS[name].single and run.several and out is None:
        raise UsageError(f"--format {name} holds one recording; give --out DIR to write one file for each")
    if out is not None:
        run.check_folder(out)
    one_picture = plot is not None and plot.suffix != "" and not plot.is_dir()
    if plot is not None and one_picture:
        if plot.suffix.lower() not in PICTURE_ENDINGS:
            raise UsageError(f"--plot {plot}: expected a picture ending in {', '.join(PICTURE_ENDINGS)}, or a folder")
        if run.several:
            raise UsageError(f"--plot {plot}: give a folder to draw several recordings")
        run.check_target(plot)
    elif plot is not None:
        run.check_folder(plot)
    predictor = _predictor(
        model,
        backend,
        precision,
        device,
        threads,
        jobs,
        run.count,
        batch_size,
        cache_dir,
        endpoint,
        offline,
        short,
        None,
        shifts,
        classes,
    )
    if operating_point is not None:
        point = predictor.config.decoding_at(operating_point)
        predictor.config = dataclasses.replace(predictor.config, decoding=point)
    predictor.config = _with_decoding(
        predictor.config, threshold=threshold, threshold_off=threshold_off,
        median_seconds=median, min_duration=min_duration, min_gap=min_gap,
    )  # fmt: skip
    at_once = name in ("table", "jsonl")  # formats whose recordings simply follow each other
    results = []
    with run:
        try:
            for stem, prediction in run.predictions(
                predictor, spectrogram=plot is not None, allow_truncated=allow_truncated
            ):
                # The table first: a picture that fails does not lose it.
                if out is not None:
                    run.write(out / f"{stem}{ending}", functools.partial(_save, prediction.detections, name))
                elif at_once:
                    run.show(format_events([prediction.detections], name))
                else:
                    results.append(prediction.detections)
                if plot is not None:
                    run.write(plot if one_picture else plot / f"{stem}.png", prediction.save_plot)
        finally:  # also when interrupted: what is done is not lost
            if out is None and not at_once and (results or not FORMATS[name].single):
                run.show(format_events(results, name))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Published weights (.ckpt, .pt, .pth, .bin, .safetensors).")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint to write (.safetensors).")],
    labels: Annotated[
        str | None,
        typer.Option(help="Label set (audioset, esc50, speech_commands_v2, desed) or a file with one label a line."),
    ] = None,
    sample_rate: Annotated[
        int | None, typer.Option(help="Hz that the weights expect.", show_default="inferred")
    ] = None,
    hop_length: Annotated[
        int | None, typer.Option(help="Samples between log-mel frames.", show_default="inferred")
    ] = None,
    f_max: Annotated[
        float | None, typer.Option(help="Hz, upper edge of the mel filters.", show_default="inferred, or 14000")
    ] = None,
    decision: Annotated[
        Decision | None,
        typer.Option(help="CNN14: a clip is its most probable frame, or classified whole.", show_default="by its name"),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in half precision.")] = False,
) -> None:
    """Turn published HTS-AT, CNN14 (PANNs), LAION-CLAP, Hugging Face CLAP or Swin weights into a checkpoint of ours."""
    from htsat.model.checkpoint import save_checkpoint
    from htsat.model.convert import convert as convert_weights

    model, config, report = convert_weights(
        source,
        labels=labels,
        sample_rate=sample_rate,
        hop_length=hop_length,
        f_max=f_max,
        decision=None if decision is None else decision.value,
    )
    print(report.summary(), file=sys.stderr)
    save_checkpoint(target, model, config, dtype="float16" if half else "float32")
    print(target)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a checkpoint, or hf://owner/repo.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .onnx.")],
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
) -> None:
    """Write a model as one ONNX file, front end inside: it runs without PyTorch, here and elsewhere."""
    from htsat.model.export import export_onnx
    from htsat.model.runtime import load_model

    if target.suffix != ".onnx":
        raise UsageError(f"{target}: expected a file ending in .onnx")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder; make it first")
    tell("tracing the network; this takes about a minute")
    network = load_model(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None)
    report = export_onnx(network, network.checkpoint, target)
    tell(
        f"{report.size / 1e6:.1f} MB; posteriors differ by at most {report.posterior_difference:.1e} from the "
        f"model's; try it: htsat detect --model {target} RECORDING"
    )
    print(target)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """List the models that can be had by name."""
    from htsat.model.hub import list_models

    rows = list_models(cache_dir=cache_dir)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = ("name", "classes", "size", "state", "description")
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a checkpoint, or hf://owner/repo.")
    ] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
) -> None:
    """Say what a checkpoint is: architecture, front end, labels, settings and where it comes from."""
    from htsat.backends import usable
    from htsat.config import USED_BY, to_dict
    from htsat.model.checkpoint import count_parameters
    from htsat.model.exported import read_model_config
    from htsat.model.hub import resolve

    path = resolve(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None)
    config = read_model_config(path)
    backends = usable(model, path)
    parameters = count_parameters(config)
    if as_json:
        print(
            json.dumps({"file": str(path), "parameters": parameters, "backends": backends, **to_dict(config)}, indent=1)
        )
        return
    print(f"file         {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"parameters   {parameters:,}")
    print(f"runs on      {', '.join(backends) or 'nothing that is installed here'}")
    print(f"time step    {config.token_seconds:g} s, {config.num_tokens} in {config.model.chunk_seconds:g} s")
    print(f"labels       {', '.join(config.labels) or 'none: an encoder that gives embeddings'}")
    sections = to_dict(config)
    shown = ("frontend", "model", "objective", "framewise", "calibration", "decoding", "operating_points", "inference")
    for section in (*shown, "provenance"):
        values = sections[section]
        if section == "provenance":  # whole reports of trainings and calibrations may lie there
            values = {key: _brief(value) for key, value in values.items()}
        if section == "model":  # what other architectures have means nothing here
            own = config.model.architecture
            values = {key: value for key, value in values.items() if own in USED_BY.get(key, (own,))}
        if isinstance(values, dict):
            print(section)
            for key, value in values.items():
                print(f"  {key:<18} {value if isinstance(value, str) else json.dumps(value)}")
        else:
            print(f"{section:<12} {values}")


def _brief(value: Any, longest: int = 200) -> Any:
    """Return a value, or its beginning if its text is too long to be read on a terminal."""
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= longest else f"{text[:longest]} ... (all of it: --json)"


app.command()(train)
app.command()(evaluate)
app.command()(score)
app.command()(calibrate)
app.command()(bench)
app.command()(serve)
app.command()(listen)
app.command(cls=DataCommand)(data)


def _predictor(
    model: str,
    backend: BackendChoice | None,
    precision: PrecisionChoice,
    device: str,
    threads: int | None,
    jobs: int | None,
    recordings: int,
    batch_size: int,
    cache_dir: Path | None,
    endpoint: str | None,
    offline: bool,
    short: Short | None,
    pooling: Pooling | None,
    shifts: int | None,
    classes: Classes | None = None,
) -> "Predictor":
    import dataclasses

    from htsat.predict import Predictor

    if short == Short.native and backend is None:
        backend = BackendChoice.torch  # graphs hear one length only
    predictor = Predictor(
        model,
        backend="auto" if backend is None else backend.value,
        precision=precision.value,
        device=device,
        threads=threads,
        jobs=jobs or "auto",
        recordings=recordings,
        batch_size=batch_size,
        cache_dir=cache_dir,
        endpoint=endpoint,
        offline=offline or None,
        classes=None if classes is None else classes.value,
        on_note=tell,
    )
    if backend == BackendChoice.auto:
        tell(f"runs on {predictor.backend}")
    if not predictor.labels:
        raise UsageError(f"model {model!r} has no classes, it gives embeddings only; choose another (htsat models)")
    inference = predictor.config.inference
    if short is not None:
        inference = dataclasses.replace(inference, short=short.value)
    if pooling is not None:
        inference = dataclasses.replace(inference, clip_pooling=pooling.value)
    if shifts is not None:
        inference = dataclasses.replace(inference, shifts=shifts)
    try:
        predictor.config = dataclasses.replace(predictor.config, inference=inference)
    except ConfigError as error:
        raise UsageError(f"these settings do not go together: {error}") from None
    return predictor


def _with_decoding(config: Any, **settings: float | None) -> Any:
    """Return a checkpoint's configuration with the decoding settings that were given."""
    import dataclasses

    given = {key: value for key, value in settings.items() if value is not None}
    decoding: DecodingConfig = config.decoding
    if "threshold" in given and "threshold_off" not in given:
        decoding = decoding.changed(threshold_off=None)
    try:
        return dataclasses.replace(config, decoding=decoding.changed(**given))
    except ConfigError as error:
        raise UsageError(f"these settings do not go together: {error}") from None


def _save(detections: "Detections", format: str, path: Path) -> None:
    """Write the events of one recording."""
    from htsat.files import write_atomic
    from htsat.formats import format_events

    write_atomic(path, format_events([detections], format))


@dataclass(frozen=True)
class _Input:
    """A recording to be read.

    Attributes:
        stem: relative path, without ending, of the files that are made of it; no two inputs share one.
        source: the recording; None: stdin; an error: it cannot be found.
    """

    stem: str
    source: Path | AudioError | None


class _Run:
    """The inputs of one command: expands them, goes on after failures and counts them.

    Leaving it with failures exits with 1.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._items: list[_Input] = []
        taken: set[str] = set()
        seen: set[Path] = set()
        several_folders = sum(map(os.path.isdir, inputs)) > 1
        for given in inputs:
            if given == "-":
                self._items.append(_Input(_free("stdin", "", taken), None))
                continue
            for found in _find(given):
                if isinstance(found, AudioError):
                    self._items.append(_Input("", found))
                    continue
                if found in seen:
                    continue
                seen.add(found)
                below = Path(found.name)
                if os.path.isdir(given):  # noqa: PTH112 - Path.is_dir raises on names that are too long
                    below = found.relative_to(given)
                    if several_folders:  # 0600.wav of Monday is not 0600.wav of Tuesday
                        below = Path(given).resolve().name / below
                self._items.append(_Input(_free(str(below.with_suffix("")), below.suffix, taken), found))
        self._failed = 0
        self._progress = Progress()
        self._lock, self._done = threading.Lock(), dict[int, float]()

    @property
    def count(self) -> int:
        """How many recordings are to be read."""
        return len(self._items)

    @property
    def several(self) -> bool:
        """Whether more than one recording is to be read."""
        return len(self._items) > 1

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder for results that cannot be made or written, before hours are spent on them."""
        for place in (folder, *folder.parents):
            if os.path.lexists(place):
                if not place.is_dir():
                    raise OutputError(f"{place}: is not a folder; choose another place for the results")
                if not os.access(place, os.W_OK | os.X_OK):
                    raise OutputError(f"{place}: no permission to write there; choose another place for the results")
                return

    def check_target(self, path: Path) -> None:
        """Refuse a file for results that cannot be written or that is an input."""
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        self.check_folder(path.parent)
        for item in self._items:
            if isinstance(item.source, Path) and path.exists() and item.source.exists() and path.samefile(item.source):
                raise UsageError(f"{path}: is a recording to be read; writing the result there would destroy it")

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._progress.clear()
        if kind is None and self._failed:
            if self.several:
                tell(f"{self._failed} of {len(self._items)} inputs failed")
            raise typer.Exit(1)

    def predictions(
        self, predictor: "Predictor", *, spectrogram: bool, allow_truncated: bool
    ) -> "Iterator[tuple[str, Prediction]]":
        """Yield (name of the output, prediction) of every recording that can be read, telling of the others."""
        sources: list[Any] = [item.source for item in self._items]
        for i, source in enumerate(sources):
            if source is None:
                try:
                    sources[i] = _stdin()
                except AudioError as error:
                    sources[i] = error
        readable = [i for i, source in enumerate(sources) if not isinstance(source, AudioError)]
        names = ["stdin" if self._items[i].source is None else str(self._items[i].source) for i in readable]
        results = predictor.predict_many(
            [sources[i] for i in readable],
            names=[name if name == "stdin" else None for name in names],
            spectrogram=spectrogram,
            allow_truncated=allow_truncated,
            on_progress=functools.partial(self._on_progress, names),
        )
        with contextlib.closing(results):
            for item, source in zip(self._items, sources, strict=True):
                result = source if isinstance(source, AudioError) else next(results)
                if isinstance(result, AudioError):
                    self.fail(str(result))
                elif isinstance(result, MemoryError):
                    advice = "try a smaller --batch-size, fewer --jobs, or --device cpu"
                    self.fail(f"{item.source or 'stdin'}: not enough memory; {advice}")
                else:
                    yield item.stem, result

    def _on_progress(self, names: Sequence[str], number: int, done: float, duration: float | None) -> None:
        """Tell how far the recordings are; several threads may."""
        with self._lock:
            self._done[number] = min(1.0, done / duration) if duration else 0.0
            count = f"[{number + 1}/{len(names)}] " if self.several else ""
            line = f"{count}{done:.0f} s  {Path(names[number]).name}"
            self._progress.update(line, sum(self._done.values()) / len(names))

    def write(self, path: Path, writer: Callable[[Path], None]) -> None:
        """Write one result file, making its folder; a failure counts and the run goes on."""
        try:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path.parent}: the folder cannot be made ({error.strerror}); choose another"
                ) from None
            writer(path)
        except HtsatError as error:
            self.fail(str(error))

    def show(self, text: str) -> None:
        """Print to stdout, below the progress line."""
        self._progress.clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def fail(self, message: str) -> None:
        """Tell of a failure and count it."""
        self._progress.clear()
        tell(message)
        self._failed += 1


def _find(given: str) -> "Iterator[Path | AudioError]":
    """Expand one argument; see ``find_audio``."""
    from htsat.audio.decode import find_audio

    try:
        yield from find_audio([given])
    except OSError as error:
        yield AudioError(f"{given}: cannot be looked at ({error.strerror}); check the path and its permissions")


def _free(stem: str, suffix: str, taken: set[str]) -> str:
    """Return a name for an output that no other input has: the stem, with its suffix or a number where needed."""
    candidates = [stem, stem + suffix, *(f"{stem}{suffix}-{i}" for i in range(2, len(taken) + 3))]
    # Some file systems take names that differ in case for one.
    name = next(c for c in candidates if c.casefold() not in taken)
    taken.add(name.casefold())
    return name


def _stdin() -> Any:
    """Return stdin as a binary file object.

    Raises:
        AudioError: there is none, or it is the keyboard.
    """
    if sys.stdin is None:
        raise AudioError("stdin: is closed; direct a recording to it: htsat detect - < recording.wav")
    if sys.stdin.isatty():
        raise AudioError("stdin: is the keyboard; direct a recording to it: htsat detect - < recording.wav")
    return sys.stdin.buffer


#: what Typer raises for wrong usage; which package defines it depends on Typer's version
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Run the command and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may hold what the encoding of stdout does not; in JSON the escape is even exact.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left
        code = 1
        _drop_stdout()
    except OSError as error:
        # Those of files are turned into our own errors where they occur, so this is a full disk behind stdout.
        tell(f"{error.filename or 'stdout'}: cannot be read or written ({error.strerror or error}); check the disk")
        code = 1
        _drop_stdout()
    sys.exit(code)


def _dispatch() -> int:
    """Run the command line and return its exit code; every expected failure is one line on stderr."""
    try:
        # Not standalone: exit codes are returned and wrong usage is raised, for us to print as one line.
        code = int(app(prog_name="htsat", standalone_mode=False) or 0)
    except HtsatError as error:
        tell(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        from htsat.backends import REMEDIES

        if error.name not in REMEDIES:
            raise
        tell(f"this needs {error.name}, which is not installed: pip install {REMEDIES[error.name]}")
        return 2
    except MemoryError as error:
        tell(f"not enough memory ({error}); close other programs or use a smaller model")
        return 1
    except _ClickError as error:
        tell(_usage_message(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        tell("interrupted")
    return code


def _usage_message(error: Any) -> str:
    """Return Typer's words for wrong usage as one sentence of ours."""
    text = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    command = getattr(getattr(error, "ctx", None), "command_path", "htsat")
    return f"{text[:1].lower()}{text[1:]}; see {command} --help"


def _drop_stdout() -> None:
    """Keep Python from complaining at exit about output that nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
