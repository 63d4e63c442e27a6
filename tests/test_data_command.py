"""``htsat data`` as a user meets it: what it prints, and its exit code."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from test_download import CLIPS, Server, esc50, esc50_zip, server

import htsat.cli
from htsat.commands.data import data

__all__ = ["esc50", "server"]  # fixtures

RATE = 8000
Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``htsat data``; returns (exit code, lines of stdout, lines of stderr)."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(data)
    app.callback()(lambda: None)
    monkeypatch.setattr(htsat.cli, "app", app)

    def call(*arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["htsat", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            htsat.cli.main()
        out, err = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder per class: two dogs, one cat."""
    rng = np.random.default_rng(0)
    for name in ("dog/rex.wav", "dog/bello.wav", "cat/tom.wav"):
        path = tmp_path / "sounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.1, 0.1, RATE), RATE)
    return tmp_path / "sounds"


def test_a_sound_folder(run: Run, sounds: Path) -> None:
    code, out, err = run("auto", sounds, "--jobs", 1)
    assert (code, err) == (0, [])
    assert out[0] == f"{sounds} (folder): 3 clips, 2 classes, one label each"
    assert "sample rates  8000 Hz" in out
    assert "clips         all: 3" in out
    assert out[-3:] == ["no warnings", "", "no problems"]
    assert [line.split() for line in out if line.startswith(("dog", "cat"))] == [["cat", "1"], ["dog", "2"]]


def test_problems_are_all_listed_and_the_exit_code_tells(run: Run, sounds: Path) -> None:
    for number in range(25):
        (sounds / "cat" / f"broken{number:02}.wav").write_text("no sound")
    (sounds / "cat" / "twin.wav").write_bytes((sounds / "dog" / "rex.wav").read_bytes())
    code, out, err = run("folder", sounds, "--jobs", 1)
    assert (code, err) == (1, [])
    start = out.index("problems: 26")
    assert out[start + 1] == "  recordings that cannot be read: 25"
    assert out[start + 2].startswith("    cat/broken00.wav: ")
    assert out[start + 22] == "    ... and 5 more (--json lists all)"
    assert out[start + 23 :] == [
        "  clips that occur twice: 1",
        "    the same sound is labelled cat and dog: cat/twin.wav, dog/rex.wav",
    ]
    code, out, err = run("folder", sounds, "--json", "--fast", "--jobs", 1)
    report = json.loads("\n".join(out))
    assert (code, err) == (1, [])
    assert [problem["kind"] for problem in report["problems"]] == ["unreadable"] * 25
    assert (report["corpus"], report["clips"], report["decoded"]) == ("folder", 29, False)


def test_many_classes_are_shortened(run: Run, tmp_path: Path) -> None:
    for number in range(60):
        for clip in range(1 + (number == 7)):
            path = tmp_path / f"class{number:02}" / f"clip{number}{'ab'[clip]}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, np.random.default_rng(2 * number + clip).uniform(-0.1, 0.1, 800), RATE)
    code, out, _ = run("auto", tmp_path, "--jobs", 1, "--fast")
    assert code == 0
    table = [line for line in out if line.startswith(("class", "..."))]
    assert table[1] == "class07      2"
    assert table[11] == "... 40 classes between ..."
    assert len(table) == 22


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["auto", "absent"], 1, "there is no such folder"),
        (["auto", "empty"], 1, "not recognised as a corpus; name the one"),
        (["auto", "file"], 1, "this is a file; name csv or strong"),
        (["esc5", "empty"], 2, "did you mean 'esc50'?"),
        (["esc50", "empty"], 1, "expected audio/ and meta/esc50.csv"),
        (["auto", "new", "--download"], 2, "needs the name of a corpus"),
        (["folder", "new", "--download"], 2, "'folder' has no public address"),
        (["esc50", "new", "--mirror", "http://127.0.0.1:9"], 2, "give --download too"),
        (["auto", "empty", "--sample-rate", "16000"], 2, "give --pack OUT too"),
        (["auto", "empty", "--verify", "--pack", "x"], 2, "exclude each other"),
        (["auto", "empty", "--verify", "--fast"], 2, "leave --download and --fast out"),
        (["auto", "empty", "--verify"], 1, "expected packed shards"),
        (["auto", "empty", "--jobs", "0"], 2, "greater than or equal to 1"),
    ],
)
def test_wrong_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    exit, out, err = run(*arguments)
    assert (exit, out, len(err)) == (code, [], 1)
    assert message in err[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_download_then_check(run: Run, server: Server, esc50: None, tmp_path: Path) -> None:
    server.files["/ESC-50-master.zip"] = esc50_zip()
    code, out, err = run("esc50", tmp_path / "esc", "--download", "--mirror", server.address, "--jobs", 1)
    assert code == 1, "the recordings of this server are empty"
    assert err[0] == f"{tmp_path / 'esc'}: fetched ESC-50-master.zip"
    assert f"  recordings that cannot be read: {CLIPS}" in out
    code, _, err = run("esc50", tmp_path / "esc", "--download", "--mirror", server.address, "--jobs", 1)
    assert err[0] == f"{tmp_path / 'esc'}: fetched nothing; everything was here"
    assert len(server.requests) == 1


def test_audioset_is_not_checked_without_audio(run: Run, server: Server, tmp_path: Path) -> None:
    from test_download import audioset

    audioset(server)
    code, out, err = run("audioset", tmp_path / "new", "--download", "--mirror", server.address)
    assert (code, out, len(err)) == (0, [], 2)
    assert "without audio" in err[1]


def test_pack_verify_and_check_what_was_packed(run: Run, sounds: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    code, out, err = run("auto", sounds, "--pack", packed, "--jobs", 1)
    assert (code, err) == (0, [])
    assert out[0].startswith(f"{packed}: 3 clips, ")
    assert run("auto", packed, "--verify") == (0, [f"{packed}: every checksum is right"], [])
    code, out, _ = run("auto", packed, "--json", "--jobs", 1)
    assert (code, json.loads("\n".join(out))["clips"]) == (0, 3)
    shard = packed / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"RIFF") + 100] ^= 1
    shard.write_bytes(content)
    code, out, _ = run("auto", packed, "--verify")
    assert (code, out[0], len(out)) == (1, f"{packed}: 2 problems", 3)
    code, out, _ = run("auto", packed, "--verify", "--json")
    assert (code, len(json.loads("\n".join(out))["problems"])) == (1, 2)


def test_what_cannot_be_packed_is_left_out_up_to_the_quota(run: Run, sounds: Path, tmp_path: Path) -> None:
    (sounds / "cat" / "broken.wav").write_text("no sound")
    code, out, err = run("auto", sounds, "--pack", tmp_path / "packed", "--jobs", 1)
    assert (code, out, len(err)) == (1, [], 1)
    assert "1 of 4 clips cannot be read" in err[0]
    code, out, err = run("auto", sounds, "--pack", tmp_path / "packed", "--jobs", 1, "--quota", 0.25)
    assert (code, len(err)) == (0, 1)
    assert "1 clips cannot be read and were left out" in err[0]
