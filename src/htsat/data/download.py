"""Corpora from their public addresses: fetched, verified, unpacked safely, in their official layout.

Everything that is under way lies in the folder ``.htsat-download`` inside the corpus' own folder; files appear beside
it only when their archive was verified and unpacked as a whole. An interrupted run goes on where it was, a finished
one does nothing.

Environment: ``HTSAT_DATA_ENDPOINT`` (a folder on a web server that holds the files by their names, see ``PUBLIC``).
"""

import errno
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from htsat.errors import DownloadError, OutputError, UsageError, nearest
from htsat.fetch import Retry, fetch, read_url
from htsat.files import write_atomic

#: called with what is being done and the share of it that is, from 0 to 1
OnProgress = Callable[[str, float], None]

STATE_FOLDER = ".htsat-download"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PublicFile:
    """One file of a corpus at its public address.

    Attributes:
        name: what a mirror calls it; distinct among all corpora.
        url: where its publisher keeps it.
        checksum: ``sha256:`` or ``md5:`` and hexadecimal digits, as published; None: the content changes, or
            ``record`` tells.
        size: bytes, exactly; None: not known beforehand.
        record: address of the Zenodo record that tells checksum and size.
        about_bytes: to download, roughly, for people.
        unpacked_bytes: on disk, roughly; 0 if the file is no archive.
        requires: (pattern, number) of files that must be there afterwards, at least.
    """

    name: str
    url: str
    checksum: str | None = None
    size: int | None = None
    record: str | None = None
    about_bytes: int = 0
    unpacked_bytes: int = 0
    requires: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class PublicCorpus:
    """A corpus that can be downloaded.

    Attributes:
        name: as ``open_corpus`` calls it.
        home: page with its description and its terms.
        files: what it consists of.
        note: what the download does not bring, and what to do about it; empty if it is complete.
        has_audio: whether recordings are among the files.
    """

    name: str
    home: str
    files: tuple[PublicFile, ...]
    note: str = ""
    has_audio: bool = True


_AUDIOSET = "https://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv"
_ESC50 = PublicFile(
    "ESC-50-master.zip",
    "https://github.com/karolpiczak/ESC-50/archive/master.zip",
    about_bytes=650_000_000,
    unpacked_bytes=900_000_000,
    requires=(("meta/esc50.csv", 1), ("audio/*.wav", 2000)),
)

PUBLIC: dict[str, PublicCorpus] = {
    corpus.name: corpus
    for corpus in (
        PublicCorpus(
            "audioset",
            "https://research.google.com/audioset/",
            (
                *(
                    PublicFile(
                        f"{name}.csv", f"{_AUDIOSET}/{name}.csv", about_bytes=about, requires=((f"{name}.csv", 1),)
                    )
                    for name, about in (
                        ("class_labels_indices", 15_000),
                        ("eval_segments", 1_200_000),
                        ("balanced_train_segments", 1_200_000),
                        ("unbalanced_train_segments", 103_000_000),
                    )
                ),
                PublicFile(
                    "ontology.json",
                    "https://raw.githubusercontent.com/audioset/ontology/master/ontology.json",
                    about_bytes=343_000,
                    requires=(("ontology.json", 1),),
                ),
            ),
            note="AudioSet is published as a list of segments of YouTube videos, without audio: these are its labels "
            "only; add the audio that you hold, or HDF5 files in the layout of PANNs, and run htsat data again",
            has_audio=False,
        ),
        PublicCorpus("esc50", "https://github.com/karolpiczak/ESC-50", (_ESC50,)),
        PublicCorpus("esc10", "https://github.com/karolpiczak/ESC-50", (_ESC50,)),
        PublicCorpus(
            "speech_commands",
            "https://arxiv.org/abs/1804.03209",
            (
                PublicFile(
                    "speech_commands_v0.02.tar.gz",
                    "https://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
                    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
                    size=2_428_923_189,
                    about_bytes=2_428_923_189,
                    unpacked_bytes=3_700_000_000,
                    requires=(("validation_list.txt", 1), ("testing_list.txt", 1), ("[a-z]*/*.wav", 1)),
                ),
            ),
        ),
        PublicCorpus(
            "desed",
            "https://project.inria.fr/desed/",
            (
                PublicFile(
                    "DESEDpublic_eval.tar.gz",
                    "https://zenodo.org/records/3588172/files/DESEDpublic_eval.tar.gz?download=1",
                    record="https://zenodo.org/api/records/3588172",
                    about_bytes=1_100_000_000,
                    unpacked_bytes=1_500_000_000,
                    requires=(("audio/eval/**/*.wav", 1), ("metadata/eval/*.tsv", 1)),
                ),
                PublicFile(
                    "dcase_synth.zip",
                    "https://zenodo.org/records/6026841/files/dcase_synth.zip?download=1",
                    record="https://zenodo.org/api/records/6026841",
                    about_bytes=10_000_000_000,
                    unpacked_bytes=13_000_000_000,
                    requires=(("audio/train/**/*.wav", 1), ("metadata/train/**/*.tsv", 1)),
                ),
            ),
            note="DESED's weakly labelled and unlabelled recordings come from YouTube and have no public address: "
            "these are the public evaluation and the synthetic set; add the others to audio/ and metadata/ if you "
            "hold them",
        ),
    )
}


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to; more is taken for an attack.

    Attributes:
        num_bytes: of all files together.
        num_members: files and folders.
    """

    num_bytes: int = 64_000_000_000
    num_members: int = 1_000_000


@dataclass(frozen=True)
class Downloaded:
    """What a download brought.

    Attributes:
        folder: where the corpus lies.
        fetched: names of the files that were fetched now; empty if everything was there.
        note: see ``PublicCorpus``.
        has_audio: see ``PublicCorpus``.
    """

    folder: Path
    fetched: tuple[str, ...]
    note: str
    has_audio: bool


def download(
    name: str,
    folder: Path,
    *,
    mirror: str | None = None,
    retry: Retry | None = None,
    limits: Limits | None = None,
    on_progress: OnProgress | None = None,
) -> Downloaded:
    """Bring a corpus to a folder, unless it is there already.

    Every archive is verified by its published checksum and size where there is one (Speech Commands; DESED, as its
    record on Zenodo tells), by the checksums inside it, and by the files that must be in it; it is deleted after it
    was unpacked. AudioSet's tables are verified by the number of segments that they announce.

    Args:
        name: a key of ``PUBLIC``.
        folder: new, empty, or of an earlier download.
        mirror: address of a folder that holds the files by their names (a Zenodo record as ``NUMBER.json``).
            Default: ``HTSAT_DATA_ENDPOINT``, else the publishers' addresses.
        retry: see ``fetch``.
        limits: of an archive.
        on_progress: told what is done.

    Raises:
        UsageError: an unknown corpus, one without a public address, or a folder that holds something else.
        DownloadError: see ``fetch``; an archive that is damaged, unsafe or not the corpus.
        OutputError: see ``fetch``.
    """
    corpus = PUBLIC.get(name)
    if corpus is None:
        raise UsageError(
            f"{name!r} has no public address{nearest(name, PUBLIC)}; those that can be downloaded: {', '.join(PUBLIC)}"
        )
    mirror = mirror or os.environ.get("HTSAT_DATA_ENDPOINT") or None
    state = folder / STATE_FOLDER
    try:
        if folder.exists() and not state.is_dir() and any(folder.iterdir()):
            raise UsageError(
                f"{folder}: holds something else already; give a new or empty folder to download {name} to, "
                "or leave --download out to check what is there"
            )
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made or looked at: {error.strerror or error}; choose another folder"
        ) from error
    fetched = []
    for file in corpus.files:
        if _is_done(file, folder):
            continue
        _bring(file, folder, corpus.home, mirror, retry, limits or Limits(), on_progress or (lambda what, share: None))
        fetched.append(file.name)
    return Downloaded(folder, tuple(fetched), corpus.note, corpus.has_audio)


def _is_done(file: PublicFile, folder: Path) -> bool:
    return _marker(file, folder).is_file() and not _lacking(file, folder)


def _marker(file: PublicFile, folder: Path) -> Path:
    return folder / STATE_FOLDER / f"{file.name}.done.json"


def _lacking(file: PublicFile, folder: Path) -> list[str]:
    """Return in words what is not there of what must be."""
    words = []
    for pattern, number in file.requires:
        found = sum(1 for path in folder.glob(pattern) if path.is_file())
        if found < number:
            words.append(f"{found} of {number} files {pattern}")
    return words


def _bring(
    file: PublicFile,
    folder: Path,
    home: str,
    mirror: str | None,
    retry: Retry | None,
    limits: Limits,
    on_progress: OnProgress,
) -> None:
    """Fetch, verify, unpack and put in its place one file of a corpus, and note that this was done."""
    state = folder / STATE_FOLDER
    archive = state / file.name
    url = f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url
    advice = f"download it by hand, put it at {archive} and run this again (see {home})"
    checksum, size = _published(file, mirror, retry, advice)

    def on_bytes(have: int, total: int | None) -> None:
        total = total or size or file.about_bytes
        on_progress(f"{file.name}: {have / 1e6:,.0f} of {total / 1e6:,.0f} MB", min(1.0, have / max(1, total)))

    fetch(
        url,
        archive,
        checksum=checksum,
        size=size,
        advice=advice,
        room=file.unpacked_bytes,
        retry=retry,
        on_bytes=on_bytes,
    )
    unpacked = state / f"{file.name}.unpacked"
    with _disk(folder):
        if file.unpacked_bytes:
            if unpacked.exists():
                shutil.rmtree(unpacked)  # of an interrupted run: it may lack anything
            on_progress(f"{file.name}: unpacking", 0.0)
            try:
                unpack(archive, unpacked, limits, lambda share: on_progress(f"{file.name}: unpacking", share))
                top = _top(unpacked)
                if lacking := _lacking(file, top):
                    raise DownloadError(
                        f"{url}: is not the corpus expected here: it holds {', '.join(lacking)}; see {home}"
                    )
            except DownloadError:
                # A verified archive would fail in the same way each time, so that keeping it helps nobody.
                archive.unlink(missing_ok=True)
                shutil.rmtree(unpacked, ignore_errors=True)
                raise
            _merge(top, folder)
            shutil.rmtree(unpacked)
        else:
            if problem := _table_problem(archive):
                archive.unlink()
                raise DownloadError(f"{url}: {problem}; it was deleted; try again, or see {home}")
            archive.replace(folder / file.name)
        archive.unlink(missing_ok=True)
    write_atomic(_marker(file, folder), json.dumps({"url": url, "checksum": checksum}))


def _published(file: PublicFile, mirror: str | None, retry: Retry | None, advice: str) -> tuple[str | None, int | None]:
    """Return the checksum and size of a file as published, as far as that is known."""
    if file.record is None:
        return file.checksum, file.size
    address = f"{mirror.rstrip('/')}/{file.record.rpartition('/')[2]}.json" if mirror else file.record
    try:
        page = read_url(address, advice=advice, retry=retry)
    except DownloadError:
        if mirror:
            return None, None  # a mirror may hold the files alone; the checksums inside the archive remain
        raise
    try:
        for entry in json.loads(page)["files"]:
            if entry["key"] == file.name:
                checksum, size = str(entry["checksum"]), int(entry["size"])
                if re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", checksum):
                    return checksum, size
    except (ValueError, KeyError, TypeError):
        pass
    raise DownloadError(f"{address}: does not tell the checksum of {file.name}; {advice}")


def _table_problem(path: Path) -> str:
    """Say what is wrong with one of AudioSet's tables, or nothing."""
    text = path.read_bytes()
    if path.suffix == ".json":
        try:
            return "" if {"id", "name"} <= json.loads(text)[0].keys() else "is no ontology"
        except (ValueError, LookupError, AttributeError):
            return "is no ontology"
    lines = text.splitlines()
    if path.name == "class_labels_indices.csv":
        named = lines and lines[0].startswith(b"index,mid,display_name") and len(lines) == 528
        return "" if named else f"expected 527 classes below index,mid,display_name, got {len(lines) - 1} lines"
    told = re.search(rb"num_segs=(\d+)", b"\n".join(lines[:3]))
    rows = sum(1 for line in lines if line and not line.startswith(b"#"))
    if told is None or int(told[1]) != rows:
        return f"announces {int(told[1]) if told else 'no'} segments and holds {rows}"
    return ""


# ---------------------------------------------------------------- archives


@dataclass(frozen=True)
class _Member:
    """An entry of an archive: a folder, a file with its content, or a link with the name it points to."""

    name: str
    is_folder: bool
    link: str | None
    size: int
    open: Callable[[], IO[bytes]] | None


def unpack(
    archive: Path, into: Path, limits: Limits | None = None, on_share: Callable[[float], None] | None = None
) -> None:
    """Unpack a zip or tar archive (plain, gzip, bzip2, xz) into a new folder.

    Nothing is written outside the folder: absolute names, names with ``..``, devices and links that do not lead to
    a file of the archive are refused. A link becomes a copy, so that no link exists through which something could
    be written. Permissions and owners are not taken over.

    Args:
        archive: the file.
        into: made; must not exist.
        limits: on what comes out.
        on_share: told how much of the archive has been read.

    Raises:
        DownloadError: the archive is damaged, unsafe or larger than ``limits``.
        OSError: the disk's.
    """
    limits = limits or Limits()
    into.mkdir(parents=True)
    written = members = 0
    links: list[tuple[Path, Path, str]] = []
    try:
        for member, share in _members(archive):
            members += 1
            if members > limits.num_members:
                raise DownloadError(f"{archive}: holds more than {limits.num_members:,} files; refused")
            parts = _safe_parts(archive, member.name)
            if not parts or parts[0] == "__MACOSX":
                continue
            path = into.joinpath(*parts)
            if member.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.link is not None:
                links.append((path, into.joinpath(*_safe_parts(archive, member.link)), member.name))
            elif member.open is not None:
                with member.open() as source, path.open("wb") as file:
                    start = written
                    while block := source.read(_BLOCK):
                        written += len(block)
                        if written > limits.num_bytes:
                            raise DownloadError(
                                f"{archive}: unpacks to more than {limits.num_bytes / 1e9:g} GB; refused"
                            )
                        file.write(block)
                    if written - start != member.size:
                        raise DownloadError(f"{archive}: breaks off in {member.name}; it was not fetched whole")
            if on_share is not None:
                on_share(share)
        for path, target, name in links:
            if not target.is_file():
                raise DownloadError(f"{archive}: {name} is a link to something that is no file of it; refused")
            written += target.stat().st_size
            if written > limits.num_bytes:
                raise DownloadError(f"{archive}: unpacks to more than {limits.num_bytes / 1e9:g} GB; refused")
            shutil.copyfile(target, path)
    except (gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DownloadError(f"{archive}: the archive is damaged ({error}); fetch it again") from error
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression, or encrypted
        raise DownloadError(f"{archive}: the archive cannot be unpacked ({error}); fetch it again") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DownloadError(
            f"{archive}: has a file and a folder of the same name, {Path(str(error.filename)).name}; refused"
        ) from error


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    """Return the parts of a member's name, which stay inside whatever folder they are joined to."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise DownloadError(f"{archive}: the name {name!r} leads out of the folder; the archive was refused")
    return parts


def _members(archive: Path) -> Iterator[tuple[_Member, float]]:
    """Yield the members of an archive in their order, each with the share of the archive read until then."""
    length = max(1, archive.stat().st_size)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            infos = zipped.infolist()
            for number, info in enumerate(infos):
                yield _zip_member(archive, zipped, info), (number + 1) / len(infos)
        return
    with archive.open("rb") as raw:
        try:
            tar = tarfile.open(fileobj=raw, mode="r:*")  # noqa: SIM115 - closed below
        except tarfile.ReadError as error:
            raise DownloadError(f"{archive}: is neither a zip nor a tar archive ({error}); fetch it again") from error
        with tar:
            for entry in tar:
                yield _tar_member(archive, tar, entry), min(1.0, raw.tell() / length)


def _zip_member(archive: Path, zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if stat.S_ISLNK(kind):
        if info.file_size > 4096:
            raise DownloadError(f"{archive}: {info.filename} is a link of {info.file_size:,} bytes; refused")
        return _Member(info.filename, False, _beside(info.filename, os.fsdecode(zipped.read(info))), 0, None)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DownloadError(f"{archive}: {info.filename} is neither a file nor a folder; the archive was refused")
    return _Member(info.filename, info.is_dir(), None, info.file_size, lambda: zipped.open(info))


def _tar_member(archive: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    if info.issym():
        return _Member(info.name, False, _beside(info.name, info.linkname), 0, None)
    if info.islnk():
        return _Member(info.name, False, info.linkname, 0, None)
    if info.isdir():
        return _Member(info.name, True, None, 0, None)
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        raise DownloadError(f"{archive}: {info.name} is neither a file nor a folder; the archive was refused")
    return _Member(info.name, False, None, info.size, lambda: content)


def _beside(name: str, link: str) -> str:
    """Return where a symbolic link leads, as a name of the archive; one that leads out keeps what is refused."""
    if link.startswith("/"):
        return link
    parts: list[str] = [part for part in name.split("/")[:-1] if part not in ("", ".")]
    for part in link.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _top(folder: Path) -> Path:
    """Return the folder below which the corpus lies: archives often hold one folder with everything in it."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _merge(source: Path, target: Path) -> None:
    """Move what is in one folder into another of the same file system."""
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir():
            _merge(path, there)
        else:
            path.replace(there)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into ours."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; "
            f"{'free some space' if full else 'check its permissions'} or choose another folder, then run this again"
        ) from error
