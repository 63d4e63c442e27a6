"""Downloads, against a server on this machine that can misbehave, and archives, some of them hostile."""

import hashlib
import io
import json
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from htsat.data import download as module
from htsat.data.corpora import KINDS
from htsat.data.download import PUBLIC, STATE_FOLDER, Limits, PublicCorpus, PublicFile, download, unpack
from htsat.errors import DownloadError, OutputError, UsageError
from htsat.fetch import Retry, checksum_of, fetch, read_url

QUICK = Retry(attempts=3, wait=0.001, timeout=5)
BODY = bytes(range(256)) * 40


@dataclass
class Server:
    """Bytes by path, and what to do wrong with the next requests."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)  # "cut", "corrupt", "500"..., "fine"; then all is well
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, If-Range
    ranges: bool = True
    etag: str | None = '"v1"'
    chunked: bool = False

    def ranges_asked(self) -> list[str | None]:
        return [asked for _, asked, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    server_state: ClassVar[Server]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        state = self.server_state
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        state.requests.append((self.path, asked, condition))
        behaviour = state.plan.pop(0) if state.plan else "fine"
        if behaviour.isdecimal():
            return self.reply(int(behaviour), Content_Length="0", Retry_After="0")
        if behaviour.startswith("to "):
            return self.reply(302, Location=behaviour[3:], Content_Length="0")
        body = state.files.get(self.path)
        if body is None:
            return self.reply(404, Content_Length="0")
        start = 0
        if asked and state.ranges and condition in (None, state.etag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(body) and asked and start:
            return self.reply(416, Content_Range=f"bytes */{len(body)}", Content_Length="0")
        part = body[start:]
        headers = {"ETag": state.etag} if state.etag else {}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        headers |= {"Transfer_Encoding": "chunked"} if state.chunked else {"Content_Length": str(len(part))}
        self.reply(206 if start else 200, **headers)
        if behaviour == "corrupt":
            part = bytes([part[0] ^ 1]) + part[1:]
        if behaviour == "cut":
            part = part[: len(part) // 2]
            self.close_connection = True
        if state.chunked:
            self.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n" + (b"" if behaviour == "cut" else b"0\r\n\r\n"))
        else:
            self.wfile.write(part)
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HTSAT_DATA_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (Handler,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state = Server(f"http://127.0.0.1:{http.server_port}")
    handler.server_state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# ---------------------------------------------------------------- one file


def test_a_file_arrives_and_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "a.bin"
    for _ in range(2):
        fetch(
            f"{server.address}/a", target, checksum=sha256(BODY), size=len(BODY),
            on_bytes=lambda have, total: seen.append((have, total)),
        )  # fmt: skip
    assert target.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert len(server.requests) == 1
    assert left(target.parent) == ["a.bin"]


def test_a_cut_connection_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    server.plan = ["cut"]
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.requests[1:] == [("/a", f"bytes={len(BODY) // 2}-", '"v1"')]


def test_the_next_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    server.plan = ["cut", "503", "503"]
    with pytest.raises(
        DownloadError, match=rf"failed after 3 attempts \(answer 503\); the first {len(BODY) // 2:,} by"
    ):
        fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert not (tmp_path / "a").exists()
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.ranges_asked()[-1] == f"bytes={len(BODY) // 2}-"


def test_another_version_is_not_sewn_to_the_first(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    server.plan = ["cut", "500", "500"]
    with pytest.raises(DownloadError):
        fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    server.files["/a"], server.etag = BODY[::-1], '"v2"'
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_validator_only_a_checksum_allows_to_resume(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.files["/a"], server.etag = BODY, etag
    server.plan = ["cut"]
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    server.plan = ["cut"]
    fetch(f"{server.address}/a", tmp_path / "b", checksum=sha256(BODY), retry=QUICK)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == BODY
    assert server.ranges_asked() == [None, None, None, f"bytes={len(BODY) // 2}-"]


def test_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.ranges = BODY, False
    server.plan = ["cut"]
    fetch(f"{server.address}/a", tmp_path / "a", checksum=sha256(BODY), retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY


def test_length_that_the_server_does_not_tell(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.chunked = BODY, True
    server.plan = ["cut"]
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY
    assert len(server.requests) == 2


def test_what_is_complete_needs_no_bytes(server: Server, tmp_path: Path) -> None:
    """A run that was killed between the last byte and the file's name."""
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY)
    fetch(f"{server.address}/a", tmp_path / "a", checksum=sha256(BODY), retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.ranges_asked() == [f"bytes={len(BODY)}-"]
    (tmp_path / "b.part").write_bytes(BODY + b"more")
    fetch(f"{server.address}/a", tmp_path / "b", checksum=sha256(BODY), retry=QUICK)
    assert (tmp_path / "b").read_bytes() == BODY


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_wrong_content_is_deleted(server: Server, tmp_path: Path, kind: str) -> None:
    server.files["/a"] = BODY
    server.plan = ["corrupt"]
    checksum = f"{kind}:{hashlib.new(kind, BODY).hexdigest()}"
    with pytest.raises(DownloadError, match="not the published file"):
        fetch(f"{server.address}/a", tmp_path / "a", checksum=checksum, retry=QUICK)
    assert left(tmp_path) == []
    fetch(f"{server.address}/a", tmp_path / "a", checksum=checksum, retry=QUICK)
    assert checksum_of(tmp_path / "a", kind) == checksum


def test_a_damaged_file_is_replaced(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    (tmp_path / "a").write_bytes(BODY[:-1])
    fetch(f"{server.address}/a", tmp_path / "a", size=len(BODY), retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY


def test_wrong_size_is_refused_before_it_is_downloaded(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    with pytest.raises(DownloadError, match=r"offers 10,240 bytes, the published file has 10,241; check the proxy"):
        fetch(f"{server.address}/a", tmp_path / "a", size=len(BODY) + 1, retry=QUICK)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("status", "words"), [(404, "no such file"), (403, "refuses access"), (418, "answered")])
def test_hopeless_answers_are_not_repeated(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.plan = [str(status)]
    with pytest.raises(DownloadError, match=rf"{words} \({status}\); ask someone") as caught:
        fetch(f"{server.address}/a", tmp_path / "a", advice="ask someone", retry=QUICK)
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)


def test_passing_failures_and_redirects(server: Server, tmp_path: Path) -> None:
    server.files["/there"] = BODY
    server.plan = ["500", "429", "to /there"]
    fetch(f"{server.address}/a", tmp_path / "a", retry=QUICK)
    assert (tmp_path / "a").read_bytes() == BODY
    server.plan = ["to /a"] * 40
    with pytest.raises(DownloadError, match="302"):
        fetch(f"{server.address}/a", tmp_path / "b", retry=QUICK)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"from 127\.0\.0\.1:9 failed after 3 attempts \(Connection refused\)"):
        fetch("http://127.0.0.1:9/a", tmp_path / "a", retry=QUICK)
    with pytest.raises(DownloadError, match="http:// or https://"):
        fetch("file:///etc/hostname", tmp_path / "a")


def test_disk(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    with pytest.raises(OutputError, match=r"GB free, .* GB are needed"):
        fetch(f"{server.address}/a", tmp_path / "a", room=1 << 60, retry=QUICK)
    assert left(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(f"{server.address}/a", tmp_path / "file" / "a", retry=QUICK)


def test_two_at_once_share_one_download(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = BODY
    threads = [
        threading.Thread(target=fetch, args=(f"{server.address}/a", tmp_path / "a"), kwargs={"retry": QUICK})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() == BODY
    assert len(server.requests) == 1


def test_small_pages(server: Server) -> None:
    server.files["/a"] = BODY
    server.plan = ["500"]
    assert read_url(f"{server.address}/a", retry=QUICK) == BODY
    with pytest.raises(DownloadError, match="more than 10 bytes"):
        read_url(f"{server.address}/a", limit=10, retry=QUICK)
    with pytest.raises(DownloadError, match="404"):
        read_url(f"{server.address}/b", retry=QUICK)


# ---------------------------------------------------------------- archives


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(*members: tuple[str, bytes | str, bytes], mode: str = "w:gz") -> bytes:
    """Make a tar archive of (name, content or link target, type)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FILE, LINK, HARD, FOLDER, DEVICE, PIPE = (
    *(tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
    *(tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE),
)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked(tmp_path: Path, content: bytes, limits: Limits | None = None) -> dict[str, bytes]:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    unpack(archive, tmp_path / "in" / "to", limits)
    return tree(tmp_path / "in" / "to")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar(tmp_path: Path, mode: str) -> None:
    members = [("./", b"", FOLDER), ("./a/b.txt", b"1", FILE), ("c", b"", FILE), ("__MACOSX/._c", b"x", FILE)]
    assert unpacked(tmp_path, tarred(*members, mode=mode)) == {"a/b.txt": b"1", "c": b""}


def test_zip(tmp_path: Path) -> None:
    shares: list[float] = []
    (tmp_path / "z").write_bytes(zipped(**{"a/": b"", "a/b.txt": b"1", "c": b"22"}))
    unpack(tmp_path / "z", tmp_path / "out", on_share=shares.append)
    assert tree(tmp_path / "out") == {"a/b.txt": b"1", "c": b"22"}
    assert shares[-1] == 1.0


def test_links_become_copies(tmp_path: Path) -> None:
    members = [("d/a", b"1", FILE), ("d/soft", "../d/a", LINK), ("e/hard", "d/a", HARD), ("early", "late", LINK)]
    found = unpacked(tmp_path, tarred(*members, ("late", b"2", FILE)))
    assert found == {"d/a": b"1", "d/soft": b"1", "e/hard": b"1", "late": b"2", "early": b"2"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


HOSTILE = {
    "absolute": tarred(("/tmp/evil", b"1", FILE)),
    "parent": tarred(("../evil", b"1", FILE)),
    "parent inside": tarred(("a/../../evil", b"1", FILE)),
    "backslash": tarred(("..\\evil", b"1", FILE)),
    "drive": tarred(("C:evil", b"1", FILE)),
    "zip parent": zipped(**{"../evil": b"1"}),
    "zip absolute": zipped(**{"/evil": b"1"}),
    "link out": tarred(("a", "../../../etc/passwd", LINK)),
    "absolute link": tarred(("a", "/etc/passwd", LINK)),
    "hard link out": tarred(("a", "../secret", HARD)),
    "link to a folder, and through it": tarred(("d/x", b"", FILE), ("a", "d", LINK), ("a/evil", b"1", FILE)),
    "link to a folder": tarred(("d/x", b"", FILE), ("a", "d", LINK)),
    "link to a link that leads out": tarred(("d/l", "..", LINK), ("m", "d/l/../../secret", LINK)),
    "link to nothing": tarred(("a", "b", LINK)),
    "device": tarred(("a", "", DEVICE)),
    "pipe": tarred(("a", "", PIPE)),
    "file as folder": tarred(("a", b"1", FILE), ("a/b", b"1", FILE)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(DownloadError, match="refused") as caught:
        unpacked(tmp_path, content)
    assert "\n" not in str(caught.value)
    outside = {name for name in tree(tmp_path) if not name.startswith("in/to/")}
    assert outside == {"secret", "archive"}
    assert b"secret" not in tree(tmp_path / "in").values()


@pytest.mark.parametrize(("kind", "target"), [(stat.S_IFLNK, "../../secret"), (stat.S_IFCHR, ""), (stat.S_IFIFO, "")])
def test_zip_with_links_and_devices(tmp_path: Path, kind: int, target: str) -> None:
    info = zipfile.ZipInfo("a")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(info, target)
    with pytest.raises(DownloadError, match="refused"):
        unpacked(tmp_path, stream.getvalue())


def test_bombs(tmp_path: Path) -> None:
    bomb = zipped(a=bytes(5_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(DownloadError, match="unpacks to more than"):
        unpacked(tmp_path, bomb, Limits(num_bytes=1_000_000))
    assert sum(map(len, tree(tmp_path / "in").values())) <= 1_000_000
    (tmp_path / "n").mkdir()
    with pytest.raises(DownloadError, match="more than 9 files"):
        unpacked(tmp_path / "n", tarred(*((str(i), b"", FILE) for i in range(10))), Limits(num_members=9))
    (tmp_path / "l").mkdir()
    links = tarred(("a", bytes(600_000), FILE), *((f"l{i}", "a", HARD) for i in range(3)))
    with pytest.raises(DownloadError, match="unpacks to more than"):
        unpacked(tmp_path / "l", links, Limits(num_bytes=1_000_000))


def test_damaged_archives(tmp_path: Path) -> None:
    noise = os.urandom(200_000)
    good = tarred(("a", noise, FILE))
    flipped = bytearray(zipped(a=noise))
    flipped[100_000] ^= 1
    for number, content in enumerate(
        (good[:100_000], bytes(flipped), zipped(a=noise)[:-10], b"<html>sorry</html>", b"")
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(DownloadError, match=r"damaged|neither a zip nor a tar|breaks off"):
            unpacked(tmp_path / str(number), content)


# ---------------------------------------------------------------- corpora


CLIPS = 40


@pytest.fixture
def esc50(monkeypatch: pytest.MonkeyPatch) -> None:
    """ESC-50 with 40 clips instead of its 2000."""
    (file,) = PUBLIC["esc50"].files
    assert file.requires == (("meta/esc50.csv", 1), ("audio/*.wav", 2000))
    small = replace(file, requires=(("meta/esc50.csv", 1), ("audio/*.wav", CLIPS)))
    monkeypatch.setitem(module.PUBLIC, "esc50", replace(PUBLIC["esc50"], files=(small,)))


def esc50_zip(clips: int = CLIPS) -> bytes:
    """The structure of the published archive, with empty recordings."""
    rows = "".join(
        f"{i % 5 + 1}-{i}-A-{i % 50}.wav,{i % 5 + 1},{i % 50},class {i % 50},False,{i},A\n" for i in range(clips)
    )
    names = {f"ESC-50-master/audio/{i % 5 + 1}-{i}-A-{i % 50}.wav": b"" for i in range(clips)}
    meta = f"filename,fold,target,category,esc10,src_file,take\n{rows}".encode()
    return zipped(**{"ESC-50-master/README.md": b"ESC-50", "ESC-50-master/meta/esc50.csv": meta, **names})


def test_esc50_is_fetched_unpacked_and_left_alone(server: Server, esc50: None, tmp_path: Path) -> None:
    server.files["/ESC-50-master.zip"] = esc50_zip()
    server.plan = ["cut"]
    said: list[tuple[str, float]] = []
    folder = tmp_path / "esc"
    brought = download(
        "esc50", folder, mirror=f"{server.address}/", retry=QUICK, on_progress=lambda *told: said.append(told)
    )
    assert (brought.fetched, brought.note, brought.has_audio) == (("ESC-50-master.zip",), "", True)
    assert len(list((folder / "audio").iterdir())) == CLIPS
    assert (folder / "meta" / "esc50.csv").is_file() and (folder / "README.md").is_file()
    assert left(folder / STATE_FOLDER) == ["ESC-50-master.zip.done.json"]
    assert all(0 <= share <= 1 for _, share in said) and "unpacking" in said[-1][0]

    asked = len(server.requests)
    assert download("esc50", folder, mirror=server.address).fetched == ()
    assert len(server.requests) == asked
    next((folder / "audio").iterdir()).unlink()
    assert download("esc50", folder, mirror=server.address, retry=QUICK).fetched == ("ESC-50-master.zip",)
    assert len(list((folder / "audio").iterdir())) == CLIPS


def test_interrupted_unpacking_starts_again(
    server: Server, esc50: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/ESC-50-master.zip"] = esc50_zip()
    monkeypatch.setenv("HTSAT_DATA_ENDPOINT", server.address)

    def interrupt(what: str, share: float) -> None:
        if "unpacking" in what and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("esc50", tmp_path, on_progress=interrupt)
    assert left(tmp_path) == [STATE_FOLDER], "nothing may look finished that is not"
    state = tmp_path / STATE_FOLDER
    (state / "ESC-50-master.zip.unpacked" / "ESC-50-master" / "audio" / "stray.wav").touch()
    download("esc50", tmp_path)
    assert len(list((tmp_path / "audio").iterdir())) == CLIPS
    assert len(server.requests) == 1, "the archive was whole and need not come twice"


def test_archive_of_something_else(server: Server, esc50: None, tmp_path: Path) -> None:
    server.files["/ESC-50-master.zip"] = esc50_zip(CLIPS - 1)
    with pytest.raises(DownloadError, match=r"it holds 39 of 40 files audio/\*\.wav"):
        download("esc50", tmp_path, mirror=server.address)
    assert left(tmp_path / STATE_FOLDER) == []
    server.files["/ESC-50-master.zip"] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="neither a zip nor a tar"):
        download("esc50", tmp_path, mirror=server.address)
    assert left(tmp_path) == [STATE_FOLDER]


def test_archive_brought_by_hand(server: Server, esc50: None, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"no such file \(404\); download it by hand, put it at (\S+) and"
    ) as caught:
        download("esc50", tmp_path, mirror=server.address)
    place = Path(str(caught.value).split("put it at ")[1].split(" and")[0])
    place.write_bytes(esc50_zip())
    asked = len(server.requests)
    download("esc50", tmp_path, mirror=server.address)
    assert (tmp_path / "meta" / "esc50.csv").is_file()
    assert len(server.requests) == asked


def test_speech_commands_must_be_the_published_bytes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = tarred(
        *((f"./{name}", b"1", FILE) for name in ("validation_list.txt", "testing_list.txt", "yes/a_nohash_0.wav")),
        ("./_background_noise_/hum.wav", b"2", FILE),
    )
    server.files["/speech_commands_v0.02.tar.gz"] = body
    with pytest.raises(DownloadError, match="published file has 2,428,923,189"):
        download("speech_commands", tmp_path / "a", mirror=server.address)
    corpus = PUBLIC["speech_commands"]
    published = replace(corpus.files[0], checksum=sha256(body), size=len(body), unpacked_bytes=1)
    monkeypatch.setitem(module.PUBLIC, "speech_commands", replace(corpus, files=(published,)))
    download("speech_commands", tmp_path / "b", mirror=server.address)
    assert left(tmp_path / "b") == [
        *(STATE_FOLDER, "_background_noise_", "testing_list.txt", "validation_list.txt", "yes"),
    ]


def desed(server: Server) -> None:
    clip = b"RIFF"
    server.files["/DESEDpublic_eval.tar.gz"] = tarred(
        ("dataset/audio/eval/public/Y1.wav", clip, FILE), ("dataset/metadata/eval/public.tsv", b"filename", FILE)
    )
    server.files["/dcase_synth.zip"] = zipped(
        **{
            "dcase_synth/audio/train/synthetic21_train/soundscapes/1.wav": clip,
            "dcase_synth/metadata/train/synthetic21_train/soundscapes.tsv": b"filename",
        }
    )


def test_desed_is_verified_by_its_records_and_merged(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desed(server)
    for number, name in (("3588172", "DESEDpublic_eval.tar.gz"), ("6026841", "dcase_synth.zip")):
        body = server.files[f"/{name}"]
        entry = {"key": name, "size": len(body), "checksum": f"md5:{hashlib.md5(body).hexdigest()}"}
        server.files[f"/{number}.json"] = json.dumps({"files": [{"key": "other"}, entry]}).encode()
    files = tuple(replace(file, unpacked_bytes=1) for file in PUBLIC["desed"].files)
    monkeypatch.setitem(module.PUBLIC, "desed", replace(PUBLIC["desed"], files=files))
    brought = download("desed", tmp_path / "a", mirror=server.address)
    assert "YouTube" in brought.note
    assert {name for name in tree(tmp_path / "a") if not name.startswith(".")} == {
        "audio/eval/public/Y1.wav",
        "metadata/eval/public.tsv",
        "audio/train/synthetic21_train/soundscapes/1.wav",
        "metadata/train/synthetic21_train/soundscapes.tsv",
    }
    server.files["/dcase_synth.zip"] += b"0"
    with pytest.raises(DownloadError, match="the published file has"):
        download("desed", tmp_path / "b", mirror=server.address)
    # What was finished before is not fetched again.
    del server.files["/3588172.json"], server.files["/6026841.json"]
    desed(server)
    assert download("desed", tmp_path / "b", mirror=server.address).fetched == ("dcase_synth.zip",)


def test_record_that_does_not_tell(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desed(server)
    file = replace(PUBLIC["desed"].files[0], url=f"{server.address}/DESEDpublic_eval.tar.gz", unpacked_bytes=1)
    for record, words in (("/absent", "404"), ("/page", "does not tell the checksum"), ("/odd", "does not tell")):
        server.files |= {"/page": b"<html>", "/odd": b'{"files": [{"key": "DESEDpublic_eval.tar.gz"}]}'}
        files = (replace(file, record=server.address + record),)
        monkeypatch.setitem(module.PUBLIC, "desed", replace(PUBLIC["desed"], files=files))
        with pytest.raises(DownloadError, match=words):
            download("desed", tmp_path, retry=QUICK)


def audioset(server: Server) -> None:
    for name, segments in (("eval", 2), ("balanced_train", 3), ("unbalanced_train", 0)):
        head = (
            f"# Segments csv created\n# num_ytids={segments}, num_segs={segments}, num_unique_labels=1\n# YTID, ...\n"
        )
        rows = "".join(f'video{i}, 30.000, 40.000, "/m/09x0r"\n' for i in range(segments))
        server.files[f"/{name}_segments.csv"] = (head + rows).encode()
    names = "".join(f"{i},/m/{i},name {i}\n" for i in range(527))
    server.files["/class_labels_indices.csv"] = f"index,mid,display_name\n{names}".encode()
    server.files["/ontology.json"] = b'[{"id": "/m/1", "name": "Sound"}]'


def test_audioset_has_labels_alone_and_says_so(server: Server, tmp_path: Path) -> None:
    audioset(server)
    brought = download("audioset", tmp_path, mirror=server.address)
    assert not brought.has_audio and "without audio" in brought.note and len(brought.fetched) == 5
    assert (tmp_path / "eval_segments.csv").read_bytes() == server.files["/eval_segments.csv"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("eval_segments.csv", lambda body: body[:-40], "announces 2 segments and holds 1"),
        ("eval_segments.csv", lambda body: b"<html>", "announces no segments"),
        ("class_labels_indices.csv", lambda body: body[:-20], "expected 527 classes"),
        ("ontology.json", lambda body: body[:-3], "is no ontology"),
    ],
)
def test_audioset_tables_are_verified(server: Server, tmp_path: Path, name: str, change, words: str) -> None:
    audioset(server)
    server.files[f"/{name}"] = change(server.files[f"/{name}"])
    with pytest.raises(DownloadError, match=words):
        download("audioset", tmp_path, mirror=server.address)
    assert not (tmp_path / name).exists()


def test_a_folder_with_something_else_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds something else already; give a new or empty folder"):
        download("esc50", tmp_path, mirror=server.address)
    with pytest.raises(OutputError, match="choose another folder"):
        download("esc50", tmp_path / "mine.txt" / "x", mirror=server.address)
    with pytest.raises(UsageError, match="'esc51' has no public address; did you mean 'esc50'"):
        download("esc51", tmp_path)
    assert not server.requests
    assert left(tmp_path) == ["mine.txt"]


def test_every_public_corpus_is_complete() -> None:
    assert set(PUBLIC) <= set(KINDS)
    names: dict[str, PublicFile] = {}
    for name, corpus in PUBLIC.items():
        assert isinstance(corpus, PublicCorpus) and corpus.name == name and corpus.home.startswith("https://")
        for file in corpus.files:
            assert names.setdefault(file.name, file) == file, "two files of one name on a mirror"
            assert file.url.startswith("https://") and file.about_bytes and file.requires
            assert file.checksum is None or file.checksum.startswith(("sha256:", "md5:"))
