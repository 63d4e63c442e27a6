"""The ``htsat`` command.

Results go to stdout, progress and errors to stderr. Exit codes: 0 every input succeeded, 1 some
failed (each is named), 2 wrong usage. Nothing heavy is imported until a command needs it.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat import __version__
from htsat.errors import AudioError, ConfigError, HtsatError, OutputError, UsageError

if TYPE_CHECKING:
    from htsat.config import DecodingConfig, InferenceConfig
    from htsat.predict import Prediction, Predictor

app = typer.Typer(
    name="htsat",
    help="Name what sounds in a recording, and say when. Start with: htsat detect RECORDING",
    no_args_is_help=True,
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


class Pooling(StrEnum):
    """How clip posteriors of several chunks become one."""

    max = "max"
    mean = "mean"
    top = "top"


Inputs = Annotated[
    list[str],
    typer.Argument(metavar="FILE|FOLDER...", help="Recordings, folders of recordings, patterns, or - for stdin."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="A name (see htsat models), a checkpoint, or hf://owner/repo.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="PyTorch's choice")]
BatchSize = Annotated[int, typer.Option(min=1, help="10-second chunks per pass of the network.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloaded models are kept; also HTSAT_CACHE.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of the model hub; also HTSAT_ENDPOINT.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never download; also HTSAT_OFFLINE=1.")]
ShortOption = Annotated[
    Short | None, typer.Option(help="Recordings under 10 s: followed by silence, or repeated.", show_default="the model's")
]
Truncated = Annotated[bool, typer.Option("--allow-truncated", help="Use what is left of truncated recordings.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"htsat {__version__}")
        raise typer.Exit


@app.command()
def tag(
    inputs: Inputs,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Tags per recording.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: filename, label, probability.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result to a file.")] = None,
    model: Model = "default",
    pooling: Annotated[
        Pooling | None, typer.Option(help="Recordings over 10 s: pool their chunks by this rule.", show_default="the model's")
    ] = None,
    short: ShortOption = None,
    device: Device = "auto",
    threads: Threads = None,
    batch_size: BatchSize = 4,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
    allow_truncated: Truncated = False,
) -> None:
    """Say what sounds in each recording: its most probable labels."""
    from htsat.formats import format_tags, write_atomic

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other; give one")
    format = "json" if as_json else "csv" if as_csv else "table"
    predictor = _predictor(model, device, threads, batch_size, cache_dir, endpoint, offline, short, pooling)
    results = []
    with _Run(inputs) as run:
        try:
            for _, prediction in run.predictions(predictor, spectrogram=False, allow_truncated=allow_truncated):
                results.append(prediction.top_tags(top))
                if format == "table" and out is None:
                    run.show(format_tags([results.pop()], "table"))
        finally:  # also when interrupted: what is done is not lost
            if format != "table" or out is not None:
                run.deliver(lambda: format_tags(results, format), out, write_atomic)


@app.command()
def detect(
    inputs: Inputs,
    format: Annotated[EventFormat, typer.Option("--format", "-f", help="Format of the result.")] = EventFormat.table,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one file per recording into this folder.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG|DIR", help="Draw spectrogram, events and posteriors; a folder for several recordings."),
    ] = None,
    model: Model = "default",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Posterior that an event must reach.", show_default="the model's")
    ] = None,
    threshold_off: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Posterior down to which it goes on.", show_default="the model's, or --threshold"),
    ] = None,
    median: Annotated[
        float | None, typer.Option(min=0, max=60, help="Seconds of median filter.", show_default="the model's")
    ] = None,
    min_duration: Annotated[
        float | None, typer.Option(min=0, max=600, help="Drop shorter events (s).", show_default="the model's")
    ] = None,
    min_gap: Annotated[
        float | None, typer.Option(min=0, max=600, help="Join events with smaller gaps (s).", show_default="the model's")
    ] = None,
    short: ShortOption = None,
    device: Device = "auto",
    threads: Threads = None,
    batch_size: BatchSize = 4,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
    allow_truncated: Truncated = False,
) -> None:
    """Say what sounds when in each recording: events with onset and offset in seconds."""
    from htsat.formats import FORMATS, format_events, write_atomic

    name = str(format)
    predictor = _predictor(model, device, threads, batch_size, cache_dir, endpoint, offline, short, None)
    predictor.config = _with_decoding(
        predictor.config, threshold=threshold, threshold_off=threshold_off,
        median_seconds=median, min_duration=min_duration, min_gap=min_gap,
    )  # fmt: skip
    ending = (FORMATS[name].endings or (".txt",))[0]
    results = []
    with _Run(inputs) as run:
        several = run.several
        if FORMATS[name].single and several and out is None:
            raise UsageError(f"--format {name} holds one recording; give --out DIR to write one file for each")
        if plot is not None and several and plot.suffix:
            raise UsageError(f"--plot {plot}: give a folder to draw several recordings")
        try:
            for stem, prediction in run.predictions(
                predictor, spectrogram=plot is not None, allow_truncated=allow_truncated
            ):
                if plot is not None:
                    run.write(plot if plot.suffix else plot / f"{stem}.png", prediction.save_plot)
                if out is not None:
                    text = format_events([prediction.detections], name)
                    run.write(out / f"{stem}{ending}", lambda path, text=text: write_atomic(path, text))
                elif name in ("table", "jsonl"):
                    run.show(format_events([prediction.detections], name))
                else:
                    results.append(prediction.detections)
        finally:  # also when interrupted: what is done is not lost
            if out is None and name not in ("table", "jsonl") and (results or not FORMATS[name].single):
                run.deliver(lambda: format_events(results, name), None, write_atomic)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Published weights (.ckpt, .pt, .pth, .bin, .safetensors).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint to write (.safetensors).")],
    labels: Annotated[
        str | None,
        typer.Option(help="Label set (audioset, esc50, speech_commands_v2, desed) or a file with one label a line."),
    ] = None,
    sample_rate: Annotated[int | None, typer.Option(help="Hz that the weights expect.", show_default="inferred")] = None,
    hop_length: Annotated[
        int | None, typer.Option(help="Samples between log-mel frames.", show_default="inferred")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in half precision.")] = False,
) -> None:
    """Turn published HTS-AT, LAION-CLAP, Hugging Face CLAP or Swin weights into a checkpoint of ours."""
    from htsat.model.checkpoint import save_checkpoint
    from htsat.model.convert import convert as convert_weights

    model, config, report = convert_weights(source, labels=labels, sample_rate=sample_rate, hop_length=hop_length)
    print(report.summary(), file=sys.stderr)
    save_checkpoint(target, model, config, dtype="float16" if half else "float32")
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a checkpoint, or hf://owner/repo.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache_dir: CacheDir = None,
    endpoint: Endpoint = None,
    offline: Offline = False,
) -> None:
    """Say what a checkpoint is: architecture, front end, labels, settings and where it comes from."""
    from htsat.config import to_dict
    from htsat.model.checkpoint import count_parameters, read_config
    from htsat.model.hub import resolve

    path = resolve(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None)
    config = read_config(path)
    parameters = count_parameters(config)
    if as_json:
        print(json.dumps({"file": str(path), "parameters": parameters, **to_dict(config)}, indent=1))
        return
    print(f"file         {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"parameters   {parameters:,}")
    print(f"time step    {config.token_seconds:g} s, {config.num_tokens} in {config.model.chunk_seconds:g} s")
    print(f"labels       {', '.join(config.labels) or 'none: an encoder that gives embeddings'}")
    sections = to_dict(config)
    for section in ("frontend", "model", "objective", "decoding", "inference", "provenance"):
        values = sections[section]
        if isinstance(values, dict):
            print(section)
            for key, value in values.items():
                print(f"  {key:<18} {value if isinstance(value, str) else json.dumps(value)}")
        else:
            print(f"{section:<12} {values}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (everyday) or a TOML file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the recipe's data folders.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder: log, state to resume from, finished model.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a model by a recipe; stopped runs go on with --resume exactly where they were saved."""
    from htsat.training.loop import Step
    from htsat.training.loop import train as run_training
    from htsat.training.recipe import load_recipe

    settings = load_recipe(recipe, set_)
    with _Progress() as progress:

        def on_step(step: Step) -> None:
            line = f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {step.scenes_per_second:.1f} scenes/s"
            progress.update(f"step {step.step}/{step.steps}  {line}", step.step / step.steps, every=50)

        path = run_training(settings, data, out, resume=resume, on_step=on_step, on_progress=progress.update)
    print((out / "report.json").read_text(encoding="utf-8"), end="")
    print(path)


def _predictor(
    model: str,
    device: str,
    threads: int | None,
    batch_size: int,
    cache_dir: Path | None,
    endpoint: str | None,
    offline: bool,
    short: Short | None,
    pooling: Pooling | None,
) -> "Predictor":
    import dataclasses

    from htsat.predict import Predictor

    predictor = Predictor(
        model,
        device=device,
        threads=threads,
        batch_size=batch_size,
        cache_dir=cache_dir,
        endpoint=endpoint,
        offline=offline or None,
    )
    if not predictor.labels:
        raise UsageError(f"model {model!r} has no classes, it gives embeddings only; choose another (htsat models)")
    changes = {"short": short, "clip_pooling": pooling}
    changed: InferenceConfig = dataclasses.replace(
        predictor.config.inference, **{key: str(value) for key, value in changes.items() if value is not None}
    )
    predictor.config = dataclasses.replace(predictor.config, inference=changed)
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


class _Run:
    """The inputs of one command: expands them, goes on after failures and counts them.

    Leaving it with failures exits with 1.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        from htsat.audio.decode import find_audio

        self._items: list[tuple[str, Path | AudioError]] = []  # name of the output, what to read
        taken: set[str] = set()
        for given in inputs:
            if given == "-":
                self._items.append((_free("stdin", "", taken), Path("-")))
                continue
            for found in find_audio([given]):
                if isinstance(found, AudioError):
                    self._items.append(("", found))
                    continue
                below = found.relative_to(given) if Path(given).is_dir() else Path(found.name)
                self._items.append((_free(str(below.with_suffix("")), below.suffix, taken), found))
        self._failed = 0
        self._progress = _Progress()

    @property
    def several(self) -> bool:
        """Whether more than one recording is to be read."""
        return len(self._items) > 1

    def __enter__(self) -> "_Run":
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._progress.__exit__(None, None, None)
        if kind is None and self._failed:
            if self.several:
                print(f"htsat: {self._failed} of {len(self._items)} inputs failed", file=sys.stderr)
            raise typer.Exit(1)

    def predictions(
        self, predictor: "Predictor", *, spectrogram: bool, allow_truncated: bool
    ) -> "Iterator[tuple[str, Prediction]]":
        """Yield (name of the output, prediction) of every recording that can be read, telling of the others."""
        for number, (stem, item) in enumerate(self._items):
            try:
                if isinstance(item, AudioError):
                    raise item
                shown = f"[{number + 1}/{len(self._items)}] {item}" if self.several else str(item)

                def on_progress(done: float, duration: float | None, shown: str = shown, number: int = number) -> None:
                    share = min(1.0, done / duration) if duration else 0.0
                    self._progress.update(f"{shown}  {done:.0f} s", (number + share) / len(self._items))

                with _stdin() if item == Path("-") else contextlib.nullcontext(item) as source:
                    yield (
                        stem,
                        predictor.predict(
                            source,
                            name="stdin" if item == Path("-") else None,
                            spectrogram=spectrogram,
                            allow_truncated=allow_truncated,
                            on_progress=on_progress,
                        ),
                    )
            except AudioError as error:
                self.fail(error)

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
        except OutputError as error:
            self.fail(error)

    def deliver(self, text: Callable[[], str], path: Path | None, write: Callable[[Path, str], None]) -> None:
        """Give the collected result to a file or to stdout."""
        if path is None:
            self.show(text())
        else:
            write(path, text())

    def show(self, text: str) -> None:
        """Print to stdout, below the progress line."""
        self._progress.clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def fail(self, error: HtsatError) -> None:
        """Tell of a failure and count it."""
        self._progress.clear()
        print(f"htsat: {error}", file=sys.stderr)
        self._failed += 1


def _free(stem: str, suffix: str, taken: set[str]) -> str:
    """Return a name for an output that no other input has: the stem, with its suffix or a number where needed."""
    candidates = [stem, stem + suffix, *(f"{stem}{suffix}-{i}" for i in range(2, 1_000_000))]
    name = next(c for c in candidates if c not in taken)
    taken.add(name)
    return name


@contextlib.contextmanager
def _stdin() -> Iterator[Path]:
    """Copy stdin to a temporary file: decoders need to seek."""
    with tempfile.NamedTemporaryFile(prefix="htsat-stdin-") as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            file.write(piece)
        file.flush()
        yield Path(file.name)


class _Progress:
    """One line on stderr that is rewritten; on something other than a terminal, nothing or a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._drawn = False
        self._count = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def update(self, line: str, share: float, every: int = 0) -> None:
        """Show a line and a bar; without a terminal every ``every``-th line, or none if 0."""
        self._count += 1
        if self._live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
            text = f"{bar} {share:4.0%}  {line}"[: width - 1]
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._drawn = True
        elif every and self._count % every == 0:
            print(line, file=sys.stderr)

    def clear(self) -> None:
        """Take the line away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._drawn = False


def main() -> None:
    """Run the command; every expected failure is one line on stderr."""
    try:
        app()
    except UsageError as error:
        print(f"htsat: {error}", file=sys.stderr)
        sys.exit(2)
    except HtsatError as error:
        print(f"htsat: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("htsat: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output has left; say nothing, and keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
