"""The figures of a run as tables in Markdown, which a terminal shows as well as a README."""

from collections.abc import Callable, Sequence
from typing import Any

#: whose time counts as 1
UNIT = "plain"
#: the network that most others are compared with
PEER = "ast"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return cells as a table; the first row holds the titles, and all columns but the first are flush right."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])]) + "\n"


def ratios(rows: Sequence[dict[str, Any]], key: str, name: str, figure: str) -> dict[tuple[Any, ...], float]:
    """Return how many times as fast as one of them all rows are, by (name, batch or precision).

    Args:
        rows: figures.
        key: what rows are compared within: ``batch`` or ``precision``.
        name: of the one that counts as 1.
        figure: milliseconds.
    """
    title = "candidate" if "candidate" in rows[0] else "network"
    units = {row[key]: row[figure] for row in rows if row[title] == name}
    return {(row[title], row[key]): units[row[key]] / row[figure] for row in rows if row[key] in units}


def text(result: dict[str, Any]) -> str:
    """Return all tables of a run, and what they depend on."""
    sections: list[tuple[str, Callable[[Any], str]]] = [
        ("speed", _speed),
        ("front", _front),
        ("training", _training),
        ("startup", _startup),
        ("decode", _decode),
    ]
    parts = [show(result[name]) for name, show in sections if name in result]
    return "\n".join([*parts, _footer(result)])


def _speed(figures: dict[str, Any]) -> str:
    rates = figures["matrix_rates"]
    sizes = [["network", "parameters, M", "GFLOP per clip", *(f"floor, {rate['precision']}, ms" for rate in rates)]]
    for network in figures["networks"]:
        flops = network["flops"]
        sizes.append(
            [
                network["network"],
                f"{network['parameters'] / 1e6:.1f}",
                "-" if flops is None else f"{flops / 1e9:.2f}",
                *(_short(network["floor_ms"][rate["precision"]]) if flops else "-" for rate in rates),
            ]
        )
    limits = markdown(sizes)
    if rates:
        found = ", ".join(f"{rate['best'] / 1e9:.0f} GFLOP/s in {rate['precision']}" for rate in rates)
        limits += (
            f"\nBest rate of matrix products measured here: {found}; the floor is what a clip takes at that rate\n"
        )
    rows = figures["rows"]
    if not rows:
        return limits
    compared = [(ratios(rows, "batch", name, f), title) for name, f, title in (
        (UNIT, "median_ms", "x plain"), (UNIT, "min_ms", "x plain, min"),
        (PEER, "median_ms", "x AST"), (PEER, "min_ms", "x AST, min"),
    )]  # fmt: skip
    compared = [(values, title) for values, title in compared if values]
    titles = ["candidate", "batch", "median ms", "min ms", "processor ms", *(title for _, title in compared)]
    table = [[*titles, "of the rate", "peak MB", "added MB", "difference", "rounds"]]
    for row in rows:
        at, share = (row["candidate"], row["batch"]), row["matrix_share"]
        distance = row["clipwise_difference"]
        table.append(
            [
                row["candidate"],
                str(row["batch"]),
                *(_short(row[figure]) for figure in ("median_ms", "min_ms", "processor_ms")),
                *(f"{values[at]:.2f}" if at in values else "-" for values, _ in compared),
                "-" if share is None else f"{share:.0%}",
                _megabytes(row["peak_bytes"]),
                _megabytes(row["added_bytes"]) if row["peak_bytes"] else "-",
                "-" if distance is None else f"{distance:.0e}",
                str(row["rounds"]),
            ]
        )
    unit = figures["unit"]
    return (
        f"{limits}\nFrom waveform to posteriors, milliseconds per {unit}; how many times as fast as others; share of "
        f"the rate of matrix\nproducts; memory of the process, and what running adds to it; largest difference of a "
        f"clip posterior from the\nsame network in double precision\n\n{markdown(table)}"
    )


def _front(figures: dict[str, Any]) -> str:
    table = [["front end", "median ms", "min ms", "processor ms", "rounds"]]
    for row in figures["rows"]:
        times = (_short(row[figure]) for figure in ("median_ms", "min_ms", "processor_ms"))
        table.append([row["way"], *times, str(row["rounds"])])
    unit = figures["unit"]
    return f"Front end alone, from waveform to log-mel spectrogram, milliseconds per {unit}\n\n{markdown(table)}"


def _training(figures: dict[str, Any]) -> str:
    rows = figures["rows"]
    small = min((row["batch"] for row in rows), default=0)
    titles = ["network", "precision", "batch", "median ms", "min ms", "processor ms"]
    shares = [(ratios(rows, "precision", PEER, f), title) for f, title in (
        ("median_ms", "of AST"), ("min_ms", "of AST, min"), ("processor_ms", "of AST, processor"),
    )] if rows else []  # fmt: skip
    shares = [(values, title) for values, title in shares if values]
    table = [[*titles, *(title for _, title in shares), "peak GB", f"at batch {small}", "rounds"]]
    for row in rows:
        at = (row["network"], row["precision"])
        table.append(
            [
                row["network"],
                row["precision"],
                str(row["batch"]),
                *(_short(row[figure]) for figure in ("median_ms", "min_ms", "processor_ms")),
                *(f"{1 / values[at]:.1%}" if at in values else "-" for values, _ in shares),
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['peak_bytes_small'] / 1e9:.2f}",
                str(row["rounds"]),
            ]
        )
    return f"Training step, milliseconds per {figures['unit']} (forward, backward, AdamW)\n\n{markdown(table)}"


def _startup(rows: list[dict[str, Any]]) -> str:
    table = [["whole process", "median s", "min s", "rounds"]]
    table += [[row["command"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}", str(row["rounds"])] for row in rows]
    return (
        f"Cold processes, file to tags (10 s of sound, bundled model), files cached by the system\n\n{markdown(table)}"
    )


def _decode(rows: list[dict[str, Any]]) -> str:
    table = [["format", "x real time", "median ms", "min ms", "rounds"]]
    for row in rows:
        times = (_short(1000 * row[figure]) for figure in ("median_s", "min_s"))
        table.append([row["format"], f"{row['times_real_time']:.0f}", *times, str(row["rounds"])])
    return f"Reading a minute of 44.1-kHz stereo: decoded, mono, resampled to 32 kHz\n\n{markdown(table)}"


def _footer(result: dict[str, Any]) -> str:
    machine, load = result["machine"], result["load"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    instructions = " ".join(machine["instructions"]) or "unknown"
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({instructions}); {machine['threads']} threads; "
        f"interleaved; {machine['date']}",
        versions,
    ]
    if load["before"] is not None:
        before, after = (" ".join(f"{value:.2f}" for value in load[when]) for when in ("before", "after"))
        lines.append(f"load average before: {before}; after: {after}")
    if load["share_of_others"] is not None:
        lines.append(f"share of the processors that other programs used meanwhile: {load['share_of_others']:.0%}")
    lines += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    lines += [f"failed: {reason}" for reason in result["failed"].values()]
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Return milliseconds with three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}" if count else "-"
