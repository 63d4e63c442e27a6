"""The command line: what it prints, writes and returns, and what becomes of bad input."""

import csv
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, ToneBackend, sound, tiny_config, write_checkpoint, write_sound

import htsat.audio.decode
import htsat.cli
import htsat.model.runtime
from htsat.commands.console import cut, one_line
from htsat.config import InferenceConfig
from htsat.formats import FORMATS, read_events

SOUNDS = {
    "a.wav": (2.0, [("low", 0.625, 1.25)]),
    "sub/b.flac": (12.5, [("high", 2.5, 5.0), ("low", 10.0, 12.5)]),
    "sub/deep/a.wav": (4.0, []),
}
COMMANDS = ["tag", "detect", "calibrate", "convert", "export", "models", "info", "train", "evaluate", "score", "data",
            "bench", "serve", "listen"]  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for name, (duration, events) in SOUNDS.items():
        write_sound(folder / name, duration, events)
    (folder / "notes.txt").write_text("no recording")
    return folder


def everything(folder: Path):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def python(*arguments, **settings):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, **settings)


# --- results -------------------------------------------------------------------------------------


def test_detect_json(command, recordings):
    code, out, err = command("detect", recordings, "--format", "json")
    assert (code, err) == (0, [])
    found = json.loads(out)
    assert [Path(item["file"]).relative_to(recordings).as_posix() for item in found] == list(SOUNDS)
    for item, (duration, events) in zip(found, SOUNDS.values(), strict=True):
        assert list(item) == ["file", "duration", "events"] and item["duration"] == duration
        assert all(list(event) == ["event_label", "onset", "offset", "probability"] for event in item["events"])
        assert [(e["event_label"], e["onset"], e["offset"]) for e in item["events"]] == events
        assert all(0.99 < e["probability"] < 1 for e in item["events"])


def test_tag_json_and_csv(command, recordings):
    code, out, _ = command("tag", recordings / "a.wav", recordings / "sub", "--json", "--top", 1)
    found = json.loads(out)
    assert code == 0 and len(found) == 3
    assert all(list(i) == ["file", "duration", "tags"] and len(i["tags"]) == 1 for i in found)
    assert found[0]["duration"] == 2.0 and list(found[0]["tags"][0]) == ["label", "probability"]
    assert found[0]["tags"][0]["label"] == "low" and found[0]["tags"][0]["probability"] > 0.99
    code, out, _ = command("tag", recordings / "a.wav", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["label"] for row in rows] == ["low", "high"]
    assert {row["filename"] for row in rows} == {str(recordings / "a.wav")}
    assert float(rows[0]["probability"]) == found[0]["tags"][0]["probability"]
    code, _, err = command("tag", recordings, "--json", "--csv")
    assert code == 2 and err == ["htsat: --json and --csv exclude each other; give one"]


def test_tag_table_and_out(command, recordings, tmp_path):
    code, table, _ = command("tag", recordings / "a.wav")
    assert code == 0 and re.search(r"a\.wav\s+low\s+0\.998\n", table)
    code, out, err = command("tag", recordings / "a.wav", "--out", tmp_path / "new" / "tags.txt")
    assert (code, out, err) == (0, "", []) and (tmp_path / "new" / "tags.txt").read_text() == table
    command("tag", recordings, "--json", "--out", tmp_path / "tags.json")
    assert len(json.loads((tmp_path / "tags.json").read_text())) == 3


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format(command, recordings, tmp_path, format):
    ending = (FORMATS[format].endings or (".txt",))[0]
    code, out, err = command("detect", recordings / "sub" / "b.flac", "--format", format)
    assert (code, err) == (0, []) and out
    code, nothing, err = command("detect", recordings, "--format", format, "--out", tmp_path / "x")
    assert (code, nothing, err) == (0, "", [])
    assert everything(tmp_path / "x") == {f"a{ending}", f"sub/b{ending}", f"sub/deep/a{ending}"}
    assert (tmp_path / "x" / f"sub/b{ending}").read_text() == out
    if format != "table":
        (read,) = read_events(tmp_path / "x" / f"sub/b{ending}", format)
        assert [(e.event_label, e.onset, e.offset) for e in sorted(read.events, key=lambda e: e.onset)] == SOUNDS[
            "sub/b.flac"
        ][1]
    code, out, err = command("detect", recordings, "--format", format)
    if FORMATS[format].single:
        assert (code, out) == (2, "") and re.fullmatch(rf"htsat: --format {format} holds one.*--out DIR.*", err[0])
    else:
        assert code == 0 and "low" in out


def test_choices_on_the_command_line_are_those_of_the_package():
    assert [str(f) for f in htsat.cli.EventFormat] == list(FORMATS)
    hints = typing.get_type_hints(InferenceConfig)
    assert sorted(htsat.cli.Short) == sorted(typing.get_args(hints["short"]))
    assert sorted(htsat.cli.Pooling) == sorted(typing.get_args(hints["clip_pooling"]))


def test_inputs_may_be_patterns_and_repeat(command, recordings):
    files = [str(recordings / "a.wav"), str(recordings / "sub" / "b.flac")]
    code, out, _ = command("detect", recordings / "[a]*", recordings / "a.wav", recordings / "*" / "b*", "-f", "jsonl")
    assert code == 0 and [json.loads(line)["file"] for line in out.splitlines()] == files


def test_outputs_do_not_overwrite_each_other(command, tmp_path):
    for name in ("x/a.wav", "x/a.flac", "x/A.wav", "y/x/a.wav", "b.wav"):
        write_sound(tmp_path / name, 1, [])
    command("detect", tmp_path / "x", "--out", tmp_path / "one", "-f", "tsv")
    assert everything(tmp_path / "one") == {"A.tsv", "a.flac.tsv", "a.wav.tsv"}
    named = {Path(read_events(p)[0].file).name for p in (tmp_path / "one").iterdir()}
    assert named == {"A.wav", "a.flac", "a.wav"}
    # several folders: each keeps its name, and again nothing is lost where these are equal
    inputs = [tmp_path / "b.wav", tmp_path / "x", tmp_path / "y", tmp_path / "y" / "x"]
    code, _, _ = command("detect", *inputs, "--out", tmp_path / "two", "-f", "tsv")
    assert code == 0
    assert everything(tmp_path / "two") == {"b.tsv", "x/A.tsv", "x/a.flac.tsv", "x/a.wav.tsv", "y/x/a.tsv"}


def test_stdin(command, recordings, monkeypatch, tmp_path):
    read, write = os.pipe()
    data = (recordings / "sub" / "b.flac").read_bytes()

    def feed():
        with open(write, "wb") as stream:
            stream.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(read) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        code, out, _ = command("detect", "-", recordings / "a.wav", "-f", "json")
    thread.join()
    assert code == 0
    found = json.loads(out)
    assert [i["file"] for i in found] == ["stdin", str(recordings / "a.wav")]
    assert [e["event_label"] for e in found[0]["events"]] == ["high", "low"]
    with open(recordings / "a.wav") as file:  # seekable
        monkeypatch.setattr("sys.stdin", file)
        assert command("detect", "-", "-f", "tsv", "--out", tmp_path)[0] == 0
    assert everything(tmp_path) == {"stdin.tsv"}


def test_stdin_that_holds_nothing(command, recordings, monkeypatch):
    _, slave = pty.openpty()
    with open(os.devnull) as nothing, open(slave) as keyboard:
        for stream, message in ((nothing, "0 bytes"), (keyboard, "is the keyboard"), (None, "is closed")):
            monkeypatch.setattr("sys.stdin", stream)
            code, out, err = command("tag", "-", recordings / "a.wav", "--csv")
            assert code == 1 and len(out.splitlines()) == 3
            assert len(err) == 2 and err[0].startswith("htsat: stdin: ") and message in err[0]


def test_settings_of_decoding(command, recordings):
    path = recordings / "sub" / "b.flac"
    assert json.loads(command("detect", path, "-f", "json", "--min-duration", 2.6)[1])[0]["events"] == []
    assert json.loads(command("detect", path, "-f", "json", "--threshold", 0.999)[1])[0]["events"] == []
    code, out, err = command("detect", path, "--threshold", 0.4, "--threshold-off", 0.6)
    assert (code, out, len(err)) == (2, "", 1) and "threshold_off" in err[0]


def test_plots(command, recordings, tmp_path):
    code, out, err = command("detect", recordings / "a.wav", "--plot", tmp_path / "new" / "one.png", "-f", "tsv")
    assert (code, err) == (0, []) and "low" in out and everything(tmp_path) == {"new/one.png"}
    assert (tmp_path / "new" / "one.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = command("detect", recordings, "--plot", tmp_path / "one.png")
    assert code == 2 and len(err) == 1 and "give a folder" in err[0]
    code, _, err = command("detect", recordings / "a.wav", "--plot", tmp_path / "one.jpeg")
    assert code == 2 and len(err) == 1 and ".png, .pdf, .svg" in err[0]
    assert everything(tmp_path) == {"new/one.png"}


def test_plots_of_several(command, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr("htsat.predict.save_plot", lambda path, **drawing: Path(path).write_text(drawing["title"]))
    (tmp_path / "with.dot").mkdir()
    for folder in ("pictures", "with.dot"):
        assert command("detect", recordings, "--plot", tmp_path / folder)[0] == 0
        assert everything(tmp_path / folder) == {"a.png", "sub/b.png", "sub/deep/a.png"}
    assert (tmp_path / "pictures" / "sub" / "b.png").read_text() == "b.flac"


# --- bad input -----------------------------------------------------------------------------------


def wav(rate=16000, samples=b"\0\0" * 1600):
    size = len(samples)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16,
                       b"data", size)  # fmt: skip
    return head + samples


BAD = {
    "empty.wav": (b"", r"0 bytes"),
    "truncated.wav": (wav(samples=b"\0\0" * 160000)[:5000], r"truncated: .*--allow-truncated"),
    "truncated.flac": (None, r"truncated|damaged"),
    "nosamples.wav": (wav(samples=b""), r"no samples; expected at least one"),
    "text.wav": (b"this is a text\n" * 9, r"text, not a recording; expected WAV"),
    "noise.mp3": (bytes(range(1, 256)) * 40, r"expected WAV|MP3"),
    "nan.wav": (None, r"NaN or infinite; expected finite"),
    "inf.wav": (None, r"NaN or infinite; expected finite"),
    "huge.wav": (None, r"exceed 1e\+12; expected about -1 to 1"),
    "onehz.wav": (wav(1), r"1 Hz; expected 4000 to 384000 Hz"),
    "tenmhz.wav": (wav(10_000_000), r"10000000 Hz; expected 4000 to 384000 Hz"),
    "unreadable.wav": (wav(), r"no permission to read it; .* change its permissions"),
    "link.wav": (None, r"link to .*nowhere\.wav, which does not exist"),
}
GOOD = ["before.wav", "silence.wav", "zlast.wav"]


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A folder with everything that is bad, good recordings between, and an unreadable file even for root."""
    folder = tmp_path / "mixed"
    write_sound(folder / "before.wav", 2, SOUNDS["a.wav"][1])
    write_sound(folder / "zlast.wav", 2, SOUNDS["a.wav"][1])
    soundfile.write(folder / "silence.wav", np.zeros(16000), 16000)
    for name, (data, _) in BAD.items():
        if data is not None:
            (folder / name).write_bytes(data)
    write_sound(folder / "truncated.flac", 20, [])
    (folder / "truncated.flac").write_bytes((folder / "truncated.flac").read_bytes()[:40000])
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e30)):
        samples = sound(2, [])
        samples[5000] = value
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="FLOAT")
    (folder / "link.wav").symlink_to(folder / "nowhere.wav")

    def guarded(path, mode):
        if Path(path).name == "unreadable.wav":
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr(htsat.audio.decode, "open", guarded, raising=False)
    return folder


@pytest.mark.parametrize("arguments", [("tag", "--json"), ("detect", "-f", "json"), ("detect", "-f", "tsv", "--out")])
def test_bad_recordings_beside_good_ones(command, mixed, tmp_path, arguments):
    (tmp_path / "nothing").mkdir()
    out_folder = [tmp_path / "out"] if arguments[-1] == "--out" else []
    lost = [tmp_path / "absent.wav", tmp_path / "no*.wav", mixed / ("x" * 300)]
    code, out, err = command(*arguments, *out_folder, mixed / "before.wav", tmp_path / "nothing", mixed, *lost)
    assert code == 1
    expected = {str(mixed / name): message for name, (_, message) in BAD.items()} | {
        str(tmp_path / "nothing"): r"the folder has no recordings; expected files ending in .*\.wav",
        str(tmp_path / "absent.wav"): r"there is no such file; expected a recording, check the path",
        str(tmp_path / "no*.wav"): r"no file matches this pattern; check it",
        str(mixed / ("x" * 300)): r"too long",
    }
    assert len(err) == len(expected) + 1, err
    assert err[-1] == f"htsat: {len(expected)} of {len(expected) + len(GOOD)} inputs failed"
    for name, message in expected.items():
        (line,) = [line for line in err if line.startswith(f"htsat: {name}: ")]
        assert re.search(message, line), line
    if out_folder:
        # the folders given are two, so each keeps its name; the first file was given by itself
        assert everything(tmp_path / "out") == {"before.tsv", "mixed/silence.tsv", "mixed/zlast.tsv"}
        results = [read_events(tmp_path / "out" / name)[0] for name in ("before.tsv", "mixed/zlast.tsv")]
        assert [len(r.events) for r in results] == [1, 1]
    else:
        assert [Path(item["file"]).name for item in json.loads(out)] == GOOD


def poisoned(path: Path) -> Path:
    """A pickle that makes a file when it is loaded."""
    import torch

    class Poison:
        def __reduce__(self):
            return (open, (str(path.with_suffix(".owned")), "w"))

    torch.save({"weights": Poison()}, path)
    return path


def edited(source: Path, target: Path, change) -> Path:
    """A checkpoint whose configuration is changed and whose weights are not."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["htsat"])
    change(config)
    header["__metadata__"]["htsat"] = json.dumps(config)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return target


def bad_checkpoints(folder: Path, good: Path):
    data = good.read_bytes()

    def file(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def relabel(config):
        config["labels"].append("bird")
        config["model"]["num_classes"] = 3

    (folder / "empty_folder").mkdir()
    yield folder / "absent.safetensors", 1, r"no such file; .htsat models. lists"
    yield folder / "empty_folder", 1, r"no such file"
    yield file("empty.safetensors", b""), 1, r"the file is empty; download or save it again"
    yield file("cut.safetensors", data[:-100]), 1, r"cut off, download"
    yield file("cut_header.safetensors", data[:100]), 1, r"cut off|damaged"
    yield file("text.safetensors", b"hello, this is no model"), 1, r"is not a safetensors checkpoint"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    foreign = len(header).to_bytes(8, "little") + header + b"\0" * 4
    yield file("foreign.safetensors", foreign), 1, r"another program .*htsat convert"
    yield poisoned(folder / "poison.ckpt"), 1, r"PyTorch pickle.*htsat convert"
    yield edited(good, folder / "labels.safetensors", relabel), 1, r"labels do not fit the weights.*demands"
    short = edited(good, folder / "short.safetensors", lambda config: config["labels"].pop())
    yield short, 1, r"1 labels for 2 classes; give as many labels"
    typo = edited(good, folder / "typo.safetensors", lambda config: config["model"].update(embed_dimm=8))
    yield typo, 1, r"did you mean 'embed_dim'"
    encoder = write_checkpoint(folder / "encoder.safetensors", tiny_config(()))
    yield encoder, 2, r"has no classes, it gives embeddings only"
    yield "defualt", 2, r"unknown model 'defualt'; did you mean 'default'"


def test_bad_checkpoints(command, recordings, tmp_path, tiny_checkpoint):
    for path, expected, message in bad_checkpoints(tmp_path, tiny_checkpoint):
        for name in ("tag", "detect"):
            code, out, err = command(name, recordings / "a.wav", "--out", tmp_path / "results", model=path)
            assert (code, out, len(err)) == (expected, "", 1), (path, err)
            assert err[0].startswith("htsat: ") and str(path) in err[0] and re.search(message, err[0]), err
    assert not (tmp_path / "poison.owned").exists(), "the pickle ran code"
    assert not (tmp_path / "results").exists()


def test_outputs_that_cannot_be_written(command, recordings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    sources = recordings / "a.wav", recordings / "sub"
    for out, message in (
        (tmp_path / "file", "file: is not a folder; choose another"),
        (tmp_path / "file" / "x" / "y", "file: is not a folder; choose another"),
    ):
        code, printed, err = command("detect", *sources, "--out", out)
        assert (code, printed, len(err)) == (1, "", 1) and message in err[0]
        code, printed, err = command("detect", *sources, "--plot", out)
        assert (code, printed, len(err)) == (1, "", 1) and message in err[0]
    code, printed, err = command("tag", *sources, "--out", tmp_path)
    assert (code, printed, len(err)) == (1, "", 1) and "is a folder; give the name of a file" in err[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = command("detect", *sources, "--out", tmp_path / "new")
    refused = f"htsat: {tmp_path}: no permission to write there; choose another place for the results"
    assert (code, err) == (1, [refused])
    assert everything(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_loses_one_result_only(command, recordings, tmp_path, monkeypatch):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "deep").write_text("in the way")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = command("detect", recordings, "-f", "csv", "--out", tmp_path / "out")
    assert (code, out, len(err)) == (1, "", 3)
    assert "out/a.csv: cannot be written: the disk is full" in err[0] and "sub/deep: the folder cannot" in err[1]
    assert err[2] == "htsat: 2 of 3 inputs failed"
    assert everything(tmp_path / "out") == {"sub/b.csv", "sub/deep"}


def test_a_recording_is_never_overwritten(command, tmp_path):
    path = write_sound(tmp_path / "a.wav", 1, [])
    before = path.read_bytes()
    (tmp_path / "again.png").symlink_to(path)
    for arguments in (("tag", path, "--out", path), ("detect", path, "--plot", tmp_path / "again.png")):
        code, _, err = command(*arguments)
        assert code == 2 and "would destroy it" in err[0] and path.read_bytes() == before


# --- running -------------------------------------------------------------------------------------


def replace_backend(monkeypatch, call):
    class Backend(ToneBackend):
        def __call__(self, chunks):
            return call(self, chunks) or super().__call__(chunks)

    monkeypatch.setattr(htsat.model.runtime, "TorchBackend", lambda network, **_: Backend(network.checkpoint))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("detect", "-f", "json"), lambda out: len(json.loads(out))),
        (("detect", "-f", "jsonl"), lambda out: len(out.splitlines())),
        (("detect",), lambda out: out.count("a.wav")),
        (("tag", "--json"), lambda out: len(json.loads(out))),
    ],
)
def test_interrupted(command, recordings, monkeypatch, arguments, count):
    def interrupt(backend, chunks):
        if len(chunks) > 1:  # the second recording
            raise KeyboardInterrupt

    replace_backend(monkeypatch, interrupt)
    code, out, err = command(*arguments, recordings)
    assert (code, err) == (130, ["htsat: interrupted"]) and count(out) == 1


def test_too_little_memory_for_one(command, recordings, monkeypatch):
    left = [0]  # failures to come: of a batch of two, and of the single chunk that is tried then

    def fail(backend, chunks):
        left[0] = max(left[0], 2 * (len(chunks) > 1))
        if left[0]:
            left[0] -= 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nsecond line")

    replace_backend(monkeypatch, fail)
    code, out, err = command("detect", recordings, "-f", "json")
    assert code == 1 and len(json.loads(out)) == 2
    assert err == [
        "htsat: too little memory for 2 chunks at once, so fewer are heard at once",
        f"htsat: {recordings}/sub/b.flac: not enough memory; try a smaller --batch-size, fewer --jobs, or --device cpu",
        "htsat: 1 of 3 inputs failed",
    ]


@pytest.mark.parametrize("error", [htsat.cli.ConfigError("a\nb"), MemoryError("20 GB")])
def test_errors_outside_recordings_are_one_line(command, recordings, monkeypatch, error):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr(htsat.model.runtime, "load_model", fail)
    code, out, err = command("tag", recordings)
    assert (code, out, len(err)) == (1, "", 1) and err[0].startswith("htsat: ")


def test_progress_is_for_terminals(command, recordings, monkeypatch):
    _, _, err = command("detect", recordings)
    assert err == []
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        code, out, _ = command("detect", recordings, "-f", "json")
        assert code == 0 and len(json.loads(out)) == 3
        terminal.write("end")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(master, 65536)
    os.close(master)
    first, second, third, end = filter(None, shown.decode().split("\r\x1b[2K"))
    assert first == "███████░░░░░░░░░░░░░  33%  [1/3] 2 s  a.wav" and third.endswith("100%  [3/3] 4 s  a.wav")
    assert second == "█████████████░░░░░░░  67%  [2/3] 12 s  b.flac" and end == "end"


def test_progress_line_cannot_be_escaped():
    assert one_line("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert cut("街街街", 5) == "街街" and cut("abc", 3) == "abc"


@pytest.mark.parametrize("name", ["Straße 街.wav", os.fsdecode(b"caf\xe9.wav")])
def test_names_that_stdout_cannot_encode(command, tmp_path, monkeypatch, name):
    path = write_sound(tmp_path / "a.wav", 1, [])
    try:
        path = path.rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses such names")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert command("detect", tmp_path, "-f", "jsonl")[0] == 0
    text = stream.buffer.getvalue().decode("ascii")
    assert text.encode().decode("unicode_escape").startswith('{"file": ' + f'"{path}"')
    # where the encoding is UTF-8, which holds everything but such bytes, the name in JSON is exact
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stream)
    assert command("detect", tmp_path, "-f", "jsonl")[0] == 0
    assert json.loads(stream.buffer.getvalue())["file"] == str(path)
    assert command("detect", tmp_path, "-f", "tsv", "--out", tmp_path / "out")[0] == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == [Path(name).stem + ".tsv"]


# --- the command itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tag"], "missing argument 'FILE|FOLDER...'; see htsat tag --help"),
        (["tag", "--nope", "x"], "no such option: --nope"),
        (["tag", "--top", "0", "x"], "invalid value for '--top' / '-k'"),
        (["tag", "--batch-size", "many", "x"], "invalid value for '--batch-size'"),
        (["detect", "x", "--format", "foo"], "'foo' is not one of 'table', 'tsv'"),
        (["detekt", "x"], "no such command 'detekt'"),
        (["detect", "x", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_wrong_usage_is_one_line(capsys, monkeypatch, tiny_checkpoint, arguments, message):
    model = ["--model", str(tiny_checkpoint)] if "--device" in arguments else []
    monkeypatch.setattr("sys.argv", ["htsat", *arguments, *model])
    with pytest.raises(SystemExit) as exit:
        htsat.cli.main()
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("htsat: ") and message in err


def test_help_is_light():
    """Every --help, --version, and the bare command, in one process that must import nothing heavy."""
    script = f"""
import contextlib, io, sys
from htsat.cli import main
for arguments in [["--help"], ["--version"], [], *([c, "--help"] for c in {COMMANDS})]:
    sys.argv = ["htsat", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try: main()
        except SystemExit as exit: code = exit.code
    print(arguments, code, len(out.getvalue()) > (10 if arguments == ["--version"] else 200))
print(sorted({{"torch", "numpy", "matplotlib", "soundfile", "rich", "huggingface_hub"}} & set(sys.modules)))
"""
    result = python("-c", script)
    *lines, heavy = result.stdout.splitlines()
    assert result.stderr == "" and heavy == "[]"
    assert lines == [
        f"{a} {0 if a else 2} True" for a in [["--help"], ["--version"], [], *([c, "--help"] for c in COMMANDS)]
    ]


def test_every_command_is_among_those_tested():
    assert sorted(c.name or c.callback.__name__ for c in htsat.cli.app.registered_commands) == sorted(COMMANDS)


def test_python_m(recordings, tiny_checkpoint):
    """A real process, a real network, and a pipe."""
    arguments = [sys.executable, "-m", "htsat", "detect", "-", str(recordings / "notes.txt"), "-f", "json"]
    with open(recordings / "a.wav", "rb") as stream:
        data = stream.read()
    result = subprocess.run(
        [*arguments, "--model", str(tiny_checkpoint), "--threshold", "0"], input=data, capture_output=True, timeout=280
    )
    assert result.returncode == 1
    (found,) = json.loads(result.stdout)
    assert found["file"] == "stdin" and [e["offset"] for e in found["events"]] == [2.0, 2.0]
    first, last = result.stderr.decode().splitlines()
    assert "notes.txt: this is text, not a recording" in first and last == "htsat: 1 of 2 inputs failed"


def test_output_that_nobody_takes():
    script = "import sys; sys.argv = ['htsat', 'models']; from htsat.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    left = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, timeout=280)
    os.close(write)
    assert (left.returncode, left.stderr) == (1, b"")
    if not Path("/dev/full").exists():
        return
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, timeout=280)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        b"htsat: stdout: cannot be read or written (No space left on device); check the disk"
    ]
