"""Writing files whole or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from htsat.errors import OutputError


def _output_error(path: str, error: OSError) -> OutputError:
    """Return an OutputError that names the path, the reason and the remedy."""
    folder = Path(path).parent
    if error.errno == errno.ENOENT:
        advice = f"the folder {folder} does not exist; create it or choose another"
    elif error.errno == errno.ENOTDIR:
        advice = f"{folder} is not a folder; choose another"
    elif error.errno == errno.EISDIR:
        advice = "it is a folder; give the name of a file"
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "no permission to write there; choose another folder or change its permissions"
    elif error.errno == errno.EROFS:
        advice = "the file system is read-only; choose another folder"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "the disk is full; free some space or choose another disk"
    else:
        advice = f"{error.strerror or error}; choose another path"
    return OutputError(f"{path}: cannot be written: {advice}")


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file whole or not at all.

    The data goes to a temporary file in the same folder that then takes the place of ``path``; whoever
    reads meanwhile finds the old file. Links are followed, and an existing file keeps its permissions.
    Devices and pipes (``/dev/stdout``) are written directly.

    Args:
        path: the file.
        data: its content; text is written in UTF-8 with line ends as they are. What UTF-8 cannot hold
            (undecodable bytes of a file name) is written as a backslash escape.

    Raises:
        OutputError: missing folder, no permission, disk full...; nothing half-written remains.
    """
    name = os.fspath(path)
    content = data.encode("utf-8", errors="backslashreplace") if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        try:
            mode = Path(name).stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if mode is not None and not stat.S_ISREG(mode):
            # Replacing a device by a file would be fatal to whoever uses it next.
            with Path(name).open("wb") as stream:
                stream.write(content)
            return
        target = Path(name).resolve()
        if mode is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        candidate = target.parent / f".htsat-{secrets.token_hex(8)}.part"
        with candidate.open("xb") as stream:
            temporary = candidate
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None:
            candidate.chmod(stat.S_IMODE(mode))
        candidate.replace(target)
        temporary = None
    except OSError as error:
        raise _output_error(name, error) from error
    finally:
        if temporary is not None:
            # The failure that brought us here is the one to report.
            with contextlib.suppress(OSError):
                temporary.unlink()
