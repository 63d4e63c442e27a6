"""Where tests find data that is too large for the repository."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """Return a path in the folder ``shared`` beside the repository, or skip the test that asks for it."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('shared', *parts))} beside the repository")
    return path
