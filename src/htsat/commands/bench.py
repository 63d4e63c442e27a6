"""``htsat bench``: size, speed, memory and start of our models beside others, on this machine."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from htsat.commands.console import Progress, tell
from htsat.errors import UsageError


def bench(
    what: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="speed (with sizes, memory and the hardware's limit), front (the front end alone), training, startup, "
            "decode; may be repeated, or a list with commas.",
            show_default="speed,front",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            "--models",
            metavar="NAME",
            help="plain (HTS-AT written plainly, which counts as 1), torch, torch-bf16, compiled, compiled-bf16, "
            "onnxruntime, openvino, openvino-bf16, clap, cnn14, ast, or default (the bundled model); may be repeated, "
            "or a list with commas.",
            show_default="all but those compiled and the bundled model",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Measure this model: a name, a checkpoint, or an exported model.",
            show_default="the published size, 527 classes, random weights",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="Clips in a call; a list with commas. A training step takes the largest.",
            show_default="1,8",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one for each core")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Times that each is measured.", show_default="5, of what is slow fewer"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all figures, as JSON.")
    ] = None,
) -> None:
    """Measure size, speed, memory, training step, start and reading of our models, beside AST, CLAP and CNN14.

    Beside them stands the rate at which this machine multiplies matrices, and the share of it that each reaches.
    """
    from htsat.apps.bench.candidates import split
    from htsat.apps.bench.measure import busy_now, doubt, writable
    from htsat.apps.bench.report import text
    from htsat.apps.bench.run import Settings, run
    from htsat.backends import cores
    from htsat.files import write_atomic

    sizes = split(batch or ["1,8"])
    if not all(size.isdecimal() for size in sizes):
        raise UsageError(f"--batch {','.join(sizes)}: expected numbers with commas between them, such as 1,8")
    settings = Settings(
        tuple(split(what or ["speed", "front"])),
        tuple(split(only or [])),
        tuple(sorted({int(size) for size in sizes})),
        threads or cores(),
        rounds,
        model,
    )
    if json_file is not None:
        writable(json_file)
    if warning := doubt(busy_now(), before=True):
        tell(f"warning: {warning}")
    with Progress() as progress:

        def note(message: str) -> None:
            progress.clear()
            tell(message)

        result = run(settings, progress.update, note)
    if json_file is not None:
        write_atomic(json_file, json.dumps(result, indent=1) + "\n")
    print(text(result), end="")
    if warning := doubt(result["load"]["share_of_others"]):
        tell(f"warning: {warning}")
    if result["failed"]:
        sys.exit(1)
