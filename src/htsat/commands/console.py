"""What every command says on stderr: one line of progress, one line per failure."""

import os
import sys
import unicodedata


class Progress:
    """One line on stderr that is rewritten; on something other than a terminal, nothing or a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._bar = "█░" if self._live and "utf" in (sys.stderr.encoding or "").lower() else "#-"
        self._drawn = False
        self._count = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def update(self, line: str, share: float, every: int = 0) -> None:
        """Show a line and a bar; without a terminal every ``every``-th line, or none if 0."""
        self._count += 1
        if self._live:
            try:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            except OSError:
                columns = 80
            done = round(20 * share)
            text = f"{self._bar[0] * done}{self._bar[1] * (20 - done)} {share:4.0%}  {one_line(line)}"
            sys.stderr.write(f"\r\x1b[2K{cut(text, columns - 1)}")
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


def cut(text: str, columns: int) -> str:
    """Return as much of ``text`` as fits a terminal's line, where East Asian characters take two columns."""
    used = 0
    for i, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:i]
    return text


def one_line(text: str) -> str:
    """Return ``text`` without line breaks and escape sequences, which names of files may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell(message: str) -> None:
    """Print one line to stderr."""
    print(f"htsat: {one_line(' '.join(message.splitlines()))}", file=sys.stderr)
