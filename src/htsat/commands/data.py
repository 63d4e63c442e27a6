"""``htsat data``: fetch a corpus, say what is in it and what is wrong with it, pack it; mix scenes of it."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from htsat.commands.console import Progress, one_line, tell
from htsat.config import from_dict, to_dict
from htsat.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    from htsat.data.check import CheckReport, Finding
    from htsat.data.corpora import Corpus

#: findings of a kind that are printed; the rest is counted, and in ``--json``
SHOWN = 20
#: classes up to which the table holds them all
_TABLE_CLASSES = 50
#: splits or folds up to which the table has a column for each
_TABLE_PARTS = 8

_HEADINGS = {
    "unreadable": "recordings that cannot be read",
    "label": "labels",
    "class": "classes without clips",
    "event": "events",
    "duplicate": "clips that occur twice",
    "leak": "sources or speakers on both sides of a split",
    "silent": "silent clips",
    "clipped": "clipped clips",
    "corpus": "tables and names",
}


def data(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS",
            help="audioset, esc50, esc10, speech_commands, desed, keywords, folder, csv, strong, "
            "or auto: whatever lies there, packed shards too.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the corpus lies, or is to lie.")],
    fetch: Annotated[
        bool, typer.Option("--download", help="First fetch what has a public address; goes on where it broke off.")
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Download from a folder of this web server; also HTSAT_DATA_ENDPOINT."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Read headers only; do not decode.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that read.", show_default="one per processor")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every finding.")] = False,
    pack: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Instead of checking, pack the corpus into shards; goes on if stopped."),
    ] = None,
    sample_rate: Annotated[
        int | None,
        typer.Option(min=4000, max=384_000, help="Hz of packed clips.", show_default="the files as they are"),
    ] = None,
    quota: Annotated[
        float, typer.Option(min=0, max=1, help="Share of clips that may be unreadable and left out when packing.")
    ] = 0.01,
    verify: Annotated[
        bool, typer.Option("--verify", help="Instead of checking, verify the checksums of packed shards.")
    ] = False,
) -> None:
    """Check a corpus: what is in it, what cannot be read, what leaks; or download or pack it first.

    Exit code 1 if there are problems. Warnings are no problems.

    To mix scenes with exact times of a corpus: htsat data mix EVENTS --out DIR (htsat data mix --help).
    """
    if pack is not None and verify:
        raise UsageError("--pack and --verify exclude each other; pack first, then verify the packed folder")
    if verify and (fetch or fast):
        raise UsageError("--verify reads a packed folder whole; leave --download and --fast out")
    if mirror is not None and not fetch:
        raise UsageError("--mirror is where --download downloads from; give --download too")
    if sample_rate is not None and pack is None:
        raise UsageError("--sample-rate is that of packed clips; give --pack OUT too")
    if fetch and corpus == "auto":
        raise UsageError("--download needs the name of a corpus instead of auto: htsat data esc50 FOLDER --download")
    workers = jobs or _processors()
    if fetch and not _download(corpus, folder, mirror):
        return
    if verify:
        _verify(folder, as_json)
        return
    opened = _open(corpus, folder)
    if pack is not None:
        _pack(opened, pack, sample_rate, quota, workers, as_json)
        return

    from htsat.data.check import check_corpus

    with Progress() as progress:

        def on_clips(done: int, total: int) -> None:
            progress.update(f"{done:,} of {total:,} clips", done / total)

        report = check_corpus(opened, decode=not fast, jobs=workers, on_clips=on_clips)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        for line in report_lines(report):
            print(line)
    if report.problems:
        raise typer.Exit(1)


class Format(StrEnum):
    """Files of ``htsat data mix``."""

    wav = "wav"
    flac = "flac"


def mix(
    events: Annotated[
        Path,
        typer.Argument(
            metavar="EVENTS", help="A corpus as htsat data knows it, or a table of labels or events: what may sound."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the scenes; goes on if stopped, and grows.")],
    backgrounds: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Recordings to lay behind the events.", show_default="noise")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Length of a scene.")] = 10.0,
    sample_rate: Annotated[int, typer.Option(min=4000, max=192_000, help="Hz.")] = 32_000,
    seed: Annotated[int, typer.Option(min=0, help="Other scenes for every seed.")] = 0,
    max_events: Annotated[int | None, typer.Option(min=1, max=100, help="Most events.", show_default="6")] = None,
    min_snr: Annotated[
        float | None, typer.Option(help="Quietest event, dB above the background.", show_default="4")
    ] = None,
    max_snr: Annotated[float | None, typer.Option(help="Loudest event.", show_default="28")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Classes to use; with ; between them if they hold commas.", show_default="all"
        ),
    ] = None,
    folds: Annotated[
        str | None, typer.Option(metavar="1,2,...", help="Folds to take clips from.", show_default="all")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Other settings, as of [mix] in recipes: reverb=0.5 ..."),
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="Files of 16 bits, both without loss.")] = Format.wav,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that mix.", show_default="one per processor")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Mix scenes with exact times of single sounds: for htsat train, evaluate and calibrate.

    Writes audio/, strong.tsv, weak.tsv, durations.tsv, where each event and background comes from, and mix.json.
    A scene depends on corpus, settings, seed and its number alone. Exit code 1 if clips could not be read.
    """
    from htsat.data.mix import MixConfig
    from htsat.data.scenes import SceneSettings, make_scenes

    plain = {"max_events": max_events, "min_snr_db": min_snr, "max_snr_db": max_snr}
    changes = {key: value for key, value in plain.items() if value is not None} | dict(map(_setting, set_ or ()))
    try:
        config = from_dict(MixConfig, to_dict(SceneSettings().config) | changes, "mix")
        chosen = None if folds is None else [int(fold) for fold in folds.split(",")]
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except ValueError:
        raise UsageError(f"--folds {folds}: expected whole numbers with commas between them, e.g. 1,2,3") from None
    with Progress() as progress:
        made = make_scenes(
            _open_events(events),
            out,
            count=count,
            settings=SceneSettings(seconds, sample_rate, seed, format_.value, config),
            backgrounds=backgrounds,
            labels=None if labels is None else [label.strip() for label in labels.split(";" if ";" in labels else ",")],
            folds=chosen,
            jobs=jobs or _processors(),
            progress=progress.update,
        )
    if as_json:
        print(json.dumps(asdict(made) | {"folder": str(made.folder)}, indent=1))
    else:
        kept = f" ({made.kept:,} of them were there)" if made.kept else ""
        print(f"{out}: {made.scenes:,} scenes{kept}, {sum(made.events.values()):,} events, {len(made.events)} classes")
    if made.ambiguous:
        tell(f"{made.ambiguous:,} clips have several labels and no times, and were left out")
    for line in made.unreadable:
        tell(line)
    if made.unreadable:
        raise typer.Exit(1)


class DataCommand(TyperCommand):
    """``htsat data``, of which ``htsat data mix`` is a command of its own; no corpus is called mix."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Return the context of the command that the arguments name."""
        if args[:1] != ["mix"]:
            return super().make_context(info_name, args, *rest, **extra)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command(context_settings={"help_option_names": ["-h", "--help"]})(mix)
        return typer.main.get_command(app).make_context(f"{info_name} mix", args[1:], *rest, **extra)


def _setting(text: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``."""
    key, _, value = (part.strip() for part in text.partition("="))
    try:
        return key, json.loads(value)
    except ValueError:
        raise UsageError(f"--set {text}: expected key=number, e.g. reverb=0.5") from None


def _open_events(events: Path) -> "Corpus":
    """Open what lies there: a corpus, or a table of events or labels."""
    from htsat.data.clips import columns_of
    from htsat.data.own import EVENT_COLUMNS

    if not events.is_file():
        return _open("auto", events)
    return _open("strong" if {*EVENT_COLUMNS} <= {*columns_of(events)} else "csv", events)


def _processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _download(name: str, folder: Path, mirror: str | None) -> bool:
    """Fetch a corpus and say whether there is sound to check now."""
    from htsat.data.download import download

    with Progress() as progress:
        brought = download(name, folder, mirror=mirror, on_progress=progress.update)
    fetched = ", ".join(brought.fetched) or "nothing; everything was here"
    print(f"{folder}: fetched {fetched}", file=sys.stderr)
    if brought.note:
        tell(brought.note)
    return brought.has_audio


def _open(name: str, folder: Path) -> "Corpus":
    from htsat.data.corpora import KINDS, open_corpus, recognise
    from htsat.data.reading import MANIFEST
    from htsat.data.shards import open_shards

    if name == "auto":
        if (folder / MANIFEST).is_file():
            return open_shards(folder)
        if (seen := recognise(folder)) is None:
            if not folder.exists():
                raise DataError(f"{folder}: there is no such folder; expected a corpus, check the path")
            if not folder.is_dir():
                raise DataError(f"{folder}: this is a file; name csv or strong instead of auto to read it as a table")
            raise DataError(
                f"{folder}: not recognised as a corpus; name the one that should lie there instead of auto "
                f"({', '.join(KINDS)}) to hear what it lacks"
            )
        name = seen
    # Empty classes are among the findings, so that they do not hide what else is wrong.
    return open_corpus(name, folder, allow_empty=True)


def _pack(corpus: "Corpus", out: Path, sample_rate: int | None, quota: float, workers: int, as_json: bool) -> None:
    from htsat.data.shards import pack

    with Progress() as progress:
        # 0: in this process, where there is one alone
        workers = workers if workers > 1 else 0
        packed = pack(corpus, out, sample_rate=sample_rate, quota=quota, workers=workers, progress=progress.update)
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    lost = len(corpus.clips) - len(packed.clips)
    if as_json:
        print(json.dumps({"folder": str(out), "clips": len(packed.clips), "left_out": lost, "bytes": size}, indent=1))
        return
    print(f"{out}: {len(packed.clips):,} clips, {size / 1e9:.2f} GB")
    if lost:
        tell(f"{lost:,} clips cannot be read and were left out; {out / 'manifest.json'} lists them")


def _verify(folder: Path, as_json: bool) -> None:
    from htsat.data.shards import verify

    with Progress() as progress:
        problems = verify(folder, progress.update)
    if as_json:
        print(json.dumps({"folder": str(folder), "problems": problems}, indent=1))
    else:
        print(f"{folder}: {'every checksum is right' if not problems else f'{len(problems)} problems'}")
        for line in _shortened(problems):
            print(f"  {one_line(line)}")
    if problems:
        raise typer.Exit(1)


# ---------------------------------------------------------------- the report


def report_lines(report: "CheckReport") -> Iterator[str]:
    """Yield a report for people, line by line."""
    kind = "one label each" if report.objective == "single_label" else "any number of labels each"
    yield f"{report.folder} ({report.name}): {report.num_clips:,} clips, {len(report.classes)} classes, {kind}"
    if (d := report.durations) is not None:
        span = f"{d.shortest:.2f} to {d.longest:.2f} s, median {d.median:.2f} s"
        yield f"durations     {span}, {d.total_hours:.2f} h in all"
    yield f"sample rates  {_counted(report.sample_rates, 'Hz')}"
    yield f"channels      {_counted(report.channels, '')}"
    yield f"clips         {', '.join(f'{part}: {count:,}' for part, count in report.parts.items()) or 'none'}"
    if report.balance is not None:
        yield f"balance       the largest class has {report.balance:.3g} times the clips of the smallest"
    if not report.decoded:
        yield "decoded       no (--fast): damage behind headers, silence, clipping and duplicates are unknown"
    yield ""
    yield from _class_table(report)
    for title, findings in (("warnings", report.warnings), ("problems", report.problems)):
        yield ""
        yield f"{title}: {len(findings):,}" if findings else f"no {title}"
        yield from _grouped(findings)


def _counted(counts: dict[int, int], unit: str) -> str:
    texts = [
        f"{value} {unit}".rstrip() + (f" ({count:,} clips)" if len(counts) > 1 else "")
        for value, count in counts.items()
    ]
    return ", ".join(texts) or "none could be read"


def _class_table(report: "CheckReport") -> Iterator[str]:
    """Yield clips per class and split; of many classes the largest and the smallest."""
    totals = {label: sum(by_part.values()) for label, by_part in report.classes.items()}
    labels = list(report.classes)
    middle = 0
    if len(labels) > _TABLE_CLASSES:
        labels.sort(key=lambda label: -totals[label])
        middle = len(labels) - SHOWN
        labels = labels[: SHOWN // 2] + labels[-SHOWN // 2 :]
    parts = list(report.parts) if 1 < len(report.parts) <= _TABLE_PARTS else []
    rows = [["class", *parts, "clips"]]
    rows += [[one_line(label), *(str(report.classes[label][p]) for p in parts), str(totals[label])] for label in labels]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells)
        if middle and number == SHOWN // 2:
            yield f"... {middle} classes between ..."


def _grouped(findings: Sequence["Finding"]) -> Iterator[str]:
    for kind in dict.fromkeys(finding.kind for finding in findings):
        lines = [finding.message for finding in findings if finding.kind == kind]
        yield f"  {_HEADINGS[kind]}: {len(lines):,}"
        for line in _shortened(lines):
            yield f"    {one_line(line)}"


def _shortened(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"... and {len(lines) - SHOWN:,} more (--json lists all)"
