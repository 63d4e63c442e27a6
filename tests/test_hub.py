"""Models by name, against a server on this machine that answers like the Hugging Face Hub and can misbehave."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_convert import prefixed, published_state, saved

from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.errors import CheckpointError, DownloadError, UsageError
from htsat.labels import label_set
from htsat.model import hub
from htsat.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from htsat.model.htsat import HTSAT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AUDIOSET = "/datasets/Jinbo-HU/PSELDNets/resolve/{}/model/HTSAT-fullset-imagenet-768d-32000hz.ckpt"


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    agent: str
    sent: int = 0


@dataclass
class Hub:
    """Files by path (with ``{}`` for the revision), and what to do wrong."""

    endpoint: str
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)  # of each GET to come: "cut", "503", "corrupt"; then all is well
    cdn: str | None = None  # send large files from here
    small: bool = False  # announce git's checksum, as for files outside LFS

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self) -> None:
        hub = self.hub
        request = Request(
            self.command,
            self.path,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("User-Agent", ""),
        )
        hub.requests.append(request)
        key = self.path.removeprefix("/cdn").replace(f"/resolve/{COMMIT}/", "/resolve/{}/")
        key = key.replace("/resolve/main/", "/resolve/{}/")
        for path, (status, code) in hub.refuse.items():
            if key.startswith(path):
                return self.reply(
                    status, {"X-Error-Code": code, "Content-Length": "0"} if code else {"Content-Length": "0"}
                )
        if key not in hub.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT, "Content-Length": "0"})
        body = hub.files[key]
        etag = hashlib.sha256(body).hexdigest()
        if hub.small:
            etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        about = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(body)),
            "ETag": f'"{etag}"',
        }
        if hub.cdn and not self.path.startswith("/cdn"):
            return self.reply(302, about | {"Location": f"{hub.cdn}/cdn{self.path}", "Content-Length": "0"})
        if self.command == "HEAD":
            return self.reply(200, about | {"Content-Length": str(len(body))})
        behaviour = hub.plan.pop(0) if hub.plan else "fine"
        if behaviour == "503":
            return self.reply(503, {"Content-Length": "0"})
        start = int(request.range.removeprefix("bytes=").split("-")[0]) if request.range else 0
        part = body[start:]
        extra = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.reply(206 if start else 200, about | extra | {"Content-Length": str(len(part))})
        if behaviour == "corrupt":
            part = bytes([part[0] ^ 1]) + part[1:]
        if behaviour == "cut":
            part = part[: len(part) // 2]
            self.close_connection = True
        request.sent = len(part)
        self.wfile.write(part)
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HTSAT_OFFLINE", "HTSAT_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    handler = type("Handler", (Handler,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{http.server_port}")  # type: ignore[attr-defined]
    monkeypatch.setenv("HTSAT_ENDPOINT", handler.hub.endpoint)  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield handler.hub  # type: ignore[attr-defined]
    http.shutdown()
    http.server_close()


def published_bytes(tmp_path: Path) -> bytes:
    """A checkpoint of the published code as a Lightning file, without the mel filters that tell its rate."""
    state = {k: v for k, v in published_state().items() if not k.startswith(("spectrogram", "logmel"))}
    torch.save({"state_dict": prefixed(state, "sed_model.")}, tmp_path / "source.ckpt")
    return (tmp_path / "source.ckpt").read_bytes()


def own_bytes(tmp_path: Path, classes: int = 3) -> bytes:
    frontend, model = FrontendConfig(), ModelConfig(classes, embed_dim=16, depths=(1,), num_heads=(2,))
    config = CheckpointConfig(frontend, model, labels=tuple("abcdefgh"[:classes]))
    save_checkpoint(tmp_path / "own.safetensors", HTSAT(frontend, model), config)
    return (tmp_path / "own.safetensors").read_bytes()


# ---------------------------------------------------------------- the way it should go


def test_named_model_is_fetched_converted_and_kept(server: Hub, tmp_path: Path) -> None:
    server.files[AUDIOSET] = published_bytes(tmp_path)
    path = hub.resolve("audioset")
    assert path.is_relative_to(tmp_path / "cache")
    model, config = load_checkpoint(path)
    assert config.labels == label_set("audioset")
    assert config.frontend == FrontendConfig()
    assert torch.equal(model.norm.weight, published_state()["norm.weight"])
    assert config.provenance["revision"] == COMMIT
    assert config.provenance["sha256"] == hashlib.sha256(server.files[AUDIOSET]).hexdigest()
    assert [r.path for r in server.gets()] == [AUDIOSET.format(COMMIT)], "the content must be pinned to a commit"
    assert all("python" not in r.agent and "torch" not in r.agent for r in server.requests), "tells what is installed"
    assert not list((tmp_path / "cache" / "downloads").iterdir()), "only the converted checkpoint is kept"

    seen = len(server.requests)
    assert hub.resolve("audioset") == path
    assert len(server.requests) == seen, "a kept model needs no request at all"


def test_second_file_name_is_tried(server: Hub, tmp_path: Path) -> None:
    state = published_state(sample_rate=48000) | {"patch_embed.mel_conv2d.weight": torch.zeros(16, 1, 4, 12)}
    body = saved(tmp_path / "x.bin", prefixed(state, "audio_branch.")).read_bytes()
    server.files["/laion/clap-htsat-fused/resolve/{}/pytorch_model.bin"] = body
    config = read_config(hub.resolve("clap-fused"))
    assert (config.model.num_classes, config.frontend.sample_rate) == (0, 48000)
    assert config.frontend.mel_scale == "htk"


def test_address_of_own_checkpoint(server: Hub, tmp_path: Path) -> None:
    server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    path = hub.resolve("hf://jane/birds")
    assert path.read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    server.files["/jane/birds/resolve/{}/sub/v2.safetensors"] = own_bytes(tmp_path, 2)
    other = hub.resolve("hf://jane/birds/sub/v2.safetensors@main")
    assert other != path
    assert read_config(other).labels == ("a", "b")
    assert len(read_config(path).labels) == 3
    with pytest.raises(UsageError, match="no address"):
        hub.resolve("hf://jane")


def test_small_file_is_checked_by_gits_checksum(server: Hub, tmp_path: Path) -> None:
    server.small = True
    server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    server.plan = ["corrupt"]
    with pytest.raises(DownloadError, match="checksum"):
        hub.resolve("hf://jane/birds")
    assert read_config(hub.resolve("hf://jane/birds")).labels == ("a", "b", "c")


def test_token_goes_to_the_hub_and_not_to_its_file_servers(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.cdn = server.endpoint.replace("127.0.0.1", "localhost")
    server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    hub.resolve("hf://jane/birds")
    by_cdn = {r.path.startswith("/cdn"): r for r in server.gets()}
    assert by_cdn[False].authorization == "Bearer hf_secret"
    assert by_cdn[True].authorization is None
    assert by_cdn[True].sent == (tmp_path / "own.safetensors").stat().st_size


def test_endpoint_and_cache_by_argument_win(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    monkeypatch.setenv("HTSAT_ENDPOINT", "http://127.0.0.1:9")
    path = hub.resolve("hf://jane/birds", endpoint=server.endpoint + "/", cache_dir=tmp_path / "elsewhere")
    assert path.is_relative_to(tmp_path / "elsewhere")
    monkeypatch.delenv("HTSAT_ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    assert hub.resolve("hf://jane/birds").is_relative_to(tmp_path / "cache")


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HTSAT_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.default_cache() == tmp_path / "htsat"
    monkeypatch.setenv("HTSAT_CACHE", str(tmp_path / "mine"))
    assert hub.default_cache() == tmp_path / "mine"


# ---------------------------------------------------------------- the ways it goes wrong


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes after which the Hub's client writes what it has: 10 MB in earnest, which small test files never reach."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    return 1024


def test_cut_connection_is_resumed_on_the_next_try(server: Hub, tmp_path: Path, small_blocks: int) -> None:
    body = published_bytes(tmp_path)
    server.files[AUDIOSET] = body
    server.plan = ["cut", "503"]
    have = len(body) // 2 // small_blocks * small_blocks
    with pytest.raises(DownloadError, match=rf"broke off after {have:,} of {len(body):,} bytes; try again"):
        hub.resolve("audioset")
    seen = len(server.gets())
    hub.resolve("audioset")
    (resumed,) = server.gets()[seen:]
    assert resumed.range == f"bytes={have}-"
    assert sum(r.sent for r in server.gets()) < len(body) + small_blocks, "no block is sent twice"


def test_cut_connection_is_resumed_at_once_if_the_server_answers(
    server: Hub, tmp_path: Path, small_blocks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    body = server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    server.plan = ["cut"]
    assert hub.resolve("hf://jane/birds").read_bytes() == body
    assert [r.range for r in server.gets()] == [None, f"bytes={len(body) // 2 // small_blocks * small_blocks}-"]
    assert capfd.readouterr() == ("", "")


def test_corrupt_download_is_found_and_deleted(server: Hub, tmp_path: Path) -> None:
    server.files[AUDIOSET] = published_bytes(tmp_path)
    server.plan = ["corrupt"]
    with pytest.raises(DownloadError, match="checksum differs"):
        hub.resolve("audioset")
    assert not list((tmp_path / "cache" / "downloads").iterdir())
    assert read_config(hub.resolve("audioset")).model.num_classes == 527
    assert server.gets()[-1].range is None


def test_leftover_of_another_length_starts_anew(server: Hub, tmp_path: Path) -> None:
    body = server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    server.plan = ["503"]
    with pytest.raises(DownloadError, match="broke off after 0"):
        hub.resolve("hf://jane/birds")
    (partial,) = (tmp_path / "cache" / "downloads").iterdir()
    partial.write_bytes(body + b"more")
    assert hub.resolve("hf://jane/birds").read_bytes() == body


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "EntryNotFound", "has no file model.safetensors or pytorch_model.bin"),
        (404, "RepoNotFound", "has no model repository jane/birds"),
        (404, "RevisionNotFound", "no revision 'main'"),
        (401, "", r"refuses access to jane/birds \(401\).*HF_TOKEN"),
        (401, "GatedRepo", "asks for agreement"),
        (403, "GatedRepo", "asks for agreement"),
        (500, "", r"answered with an error \(500\)"),
    ],
)
def test_refusals_say_what_to_do(server: Hub, status: int, code: str, message: str) -> None:
    server.refuse["/jane/birds"] = (status, code)
    with pytest.raises(DownloadError, match=message) as caught:
        hub.resolve("hf://jane/birds")
    assert "\n" not in str(caught.value)


def test_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTSAT_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot be reached.*https://.*hz\.ckpt elsewhere and `htsat convert`"):
        hub.resolve("audioset")


def test_server_that_is_no_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: Handler) -> None:
        self.reply(200, {"Content-Length": "0"})

    monkeypatch.setattr(Handler, "answer", plain)
    with pytest.raises(DownloadError, match="does not answer like"):
        hub.resolve("hf://jane/birds")


@pytest.mark.parametrize("variable", ["HTSAT_OFFLINE", "HF_HUB_OFFLINE", None])
def test_offline(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match="switched off"):
        hub.resolve("hf://jane/birds", offline=None if variable else True)
    assert not server.requests
    path = hub.resolve("hf://jane/birds", offline=False)
    assert hub.resolve("hf://jane/birds", offline=True) == path


def test_damaged_cache_is_fetched_again(server: Hub, tmp_path: Path) -> None:
    body = server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    path = hub.resolve("hf://jane/birds")
    path.write_bytes(body[:-1])
    assert hub.resolve("hf://jane/birds").read_bytes() == body


def test_download_that_is_no_htsat(server: Hub, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.bin")
    server.files["/jane/birds/resolve/{}/pytorch_model.bin"] = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(CheckpointError, match=r"'hf://jane/birds': .*holds no HTS-AT.*`htsat convert`"):
        hub.resolve("hf://jane/birds")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_two_processes_at_once_share_one_download(server: Hub, tmp_path: Path) -> None:
    body = server.files["/jane/birds/resolve/{}/model.safetensors"] = own_bytes(tmp_path)
    code = (
        "import sys; from htsat.model.hub import resolve; print(resolve('hf://jane/birds')); "
        "assert 'torch' not in sys.modules"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert Path(outputs[0][0].strip()).read_bytes() == body
    assert sum(r.sent for r in server.gets()) == len(body)
    assert not outputs[0][1], "no progress bar where stderr is no terminal"


# ---------------------------------------------------------------- without the Hub


def test_local_paths(tmp_path: Path) -> None:
    own_bytes(tmp_path)
    assert hub.resolve(tmp_path / "own.safetensors") == tmp_path / "own.safetensors"
    (tmp_path / "run").mkdir()
    (tmp_path / "own.safetensors").rename(tmp_path / "run" / "model.safetensors")
    assert hub.resolve(str(tmp_path / "run")) == tmp_path / "run" / "model.safetensors"
    published_bytes(tmp_path)
    with pytest.raises(CheckpointError, match=r"source\.ckpt: looks like a PyTorch pickle.*htsat convert source\.ckpt"):
        hub.resolve(tmp_path / "source.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        hub.resolve("absent.safetensors")


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'audiost'; did you mean 'audioset'.*`htsat models`"):
        hub.resolve("audiost")


def test_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = Path(hub.__file__).parents[1] / "assets" / "default.safetensors"
    if bundled.is_file():
        assert hub.resolve("default") == bundled
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "model" / "hub.py"))
    with pytest.raises(CheckpointError, match="lacks the model 'default'"):
        hub.resolve("default")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "default.safetensors").touch()
    # parents[1] of .../model/hub.py is the package folder
    assert hub.resolve("default") == tmp_path / "assets" / "default.safetensors"


def test_list_of_models(server: Hub, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in hub.list_models()}
    assert list(rows) == list(hub.MODELS)
    assert rows["default"]["state"] in ("bundled", "missing")
    assert (rows["audioset"]["state"], rows["audioset"]["size"], rows["audioset"]["classes"]) == (
        "download",
        "127 MB",
        527,
    )
    assert not server.requests
    server.files[AUDIOSET] = published_bytes(tmp_path)
    hub.resolve("audioset")
    (row,) = [row for row in hub.list_models() if row["name"] == "audioset"]
    assert (row["state"], row["size"], row["classes"]) == ("ready", "2 MB", 527)
    assert json.dumps(row)


def test_every_named_model_is_complete() -> None:
    for name, model in hub.MODELS.items():
        assert model.name == name
        assert (model.bundled is None) != (model.repo_id is None)
        assert model.description and model.license and "\n" not in model.description
        assert model.source == "bundled" or model.source.startswith("hf://")
