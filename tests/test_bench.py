"""``htsat bench``: who takes turns, what is counted, who is trusted; by hand-made figures and tiny networks."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time

import numpy as np
import pytest
import torch
from bench_jobs import Counter
from conftest import tiny_config, write_checkpoint
from torch import nn
from torch.nn import functional as F

import htsat.apps.bench.run
import htsat.apps.bench.speed
import htsat.model.export
from htsat.apps.bench import candidates, files, front, hardware, measure, report, training
from htsat.apps.bench.baselines import size
from htsat.apps.bench.candidates import Candidate, choose, lacking, split
from htsat.apps.bench.measure import BenchError, Sample, Times, Work, apart, doubt, processes, take_turns
from htsat.apps.bench.plain import plain_port_of, unlike
from htsat.apps.bench.run import Settings, run
from htsat.apps.bench.speed import SpeedJob, Trial, measure_speed, usual_rounds
from htsat.apps.bench.subjects import FULL, Sources, batch_of, difference, prepare, randomised
from htsat.audio.mel import log_mel
from htsat.backends import installed
from htsat.config import FrontendConfig
from htsat.errors import ConfigError, UsageError
from htsat.model.hub import bundled_export, resolve


def nothing(*_):
    """Take what is told, and say nothing."""


# ------------------------------------------------------------------ turns and processes


def test_candidates_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    found = take_turns(calls, {"a": 3, "b": 1, "c": 2}, rest=0)
    assert "".join(order) == "abcaca"
    assert found == {"a": [1, 4, 6], "b": [2], "c": [3, 5]}


def test_each_candidate_has_a_process_of_its_own():
    failures, started = {}, []
    jobs = [Counter("a"), Counter("b", "start"), Counter("c", "die"), Counter("d", "2")]
    with processes(jobs, lambda name, error: failures.update({name: error}), started.append) as workers:
        assert [worker.name for worker in workers] == ["a", "d"] and started == ["a", "b", "c", "d"]
        (a, one, said), (d, *_) = (worker.ask("x") for worker in workers)
        assert (one, said) == (1, "x") and len({a, d, os.getpid()}) == 3
        assert workers[0].ask(None) == (a, 2, None)
        with pytest.raises(BenchError, match=r"^d: cannot be run \(one line\)$"):
            workers[1].ask("y")
    assert str(failures["b"]) == "b is not installed" and isinstance(failures["b"], UsageError)
    assert str(failures["c"]) == "c: its process ended; there may be too little memory"
    for pid in (a, d):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_function_called_apart():
    assert apart("pid", os.getpid) != os.getpid()
    with pytest.raises(BenchError, match=r"^length: cannot be run \(object of type 'int' has no len\(\)\)$"):
        apart("length", len, 3)


# ------------------------------------------------------------------ time, memory, load


def test_median_and_minimum():
    assert Times.of([5.0, 1.0, 2.0]) == Times(2.0, 1.0)
    with pytest.raises(BenchError, match="not finite"):
        Times.of([1.0, float("nan")])


def test_slow_candidates_have_fewer_rounds():
    assert [usual_rounds(seconds) for seconds in (0.0, 0.1, 2.0, 3.0, 4.0, 60.0)] == [5, 5, 5, 4, 3, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells all of it")
def test_time_and_memory_of_a_call():
    measure.forget_peak()
    held = measure.held_memory()
    found = measure.sample(lambda: np.ones(50_000_000 // 8).sum())
    assert 45e6 < found.peak - held < 80e6
    assert found.wall > 0 and found.processor > 0
    idle = measure.sample(lambda: time.sleep(0.05))
    assert idle.wall >= 0.05 > idle.processor


def test_share_of_others():
    before = Work(all=100.0, capacity=1000.0, own=10.0)
    # In 20 processor seconds 9 were worked, 4 of them by us.
    assert before.others(Work(109.0, 1020.0, 14.0)) == pytest.approx(0.25)
    assert before.others(Work(104.0, 1020.0, 14.5)) == 0.0
    assert before.others(Work(None, 0.0, 14.0)) is None
    assert before.others(before) is None


def test_a_busy_machine_is_told():
    assert doubt(None) is None and doubt(0.1) is None
    assert "used 25% of the processors meanwhile: trust no times" in doubt(0.25)
    assert "use 25% of the processors now" in doubt(0.25, before=True)


def test_the_machine():
    found = measure.machine(3)
    assert found["threads"] == 3 and found["versions"]["numpy"] == np.__version__
    assert found["processor"] and found["cores"] >= 1


# ------------------------------------------------------------------ counting


class Layers(nn.Module):
    """Some layers whose operations are counted by hand."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = nn.Conv1d(1, 2, 3, bias=False)

    def forward(self, x):
        self.linear(x)  # (3, 5)
        self.conv(x.unsqueeze(1))  # (3, 1, 5) -> (3, 2, 3)
        torch.fft.rfft(torch.zeros(4, 8))
        F.scaled_dot_product_attention(*torch.zeros(3, 1, 2, 6, 4))  # two heads, six tokens of width 4


@pytest.mark.parametrize("train_path", [False, True])
def test_operations_and_parameters(train_path):
    linear, conv, transform = 2 * 3 * 5 * 7, 2 * (3 * 2 * 3) * 3, 4 * 2.5 * 8 * 3
    attention = 2 * (2 * 2 * 6 * 6 * 4)
    expected = 5 * 7 + 7 + 2 * 3, linear + conv + transform + attention
    assert size(Layers(), torch.zeros(3, 5), train_path=train_path) == expected


# ------------------------------------------------------------------ candidates


def test_names():
    assert split(["a,b", " c ,", "a"]) == ["a", "b", "c"]
    assert [c.name for c in choose(["ast", "torch", "plain"], FULL)] == ["plain", "torch", "ast"]
    (ast,) = choose(["ast"], FULL)
    assert ast.subject == "ast" and not ast.is_exported and ast.is_float32
    bundled = choose(["default"], FULL)
    assert [c.name for c in bundled] == ["default/torch", "default/onnxruntime", "default/openvino"]
    assert {c.subject for c in bundled} == {"default"}
    assert [c.name for c in choose(["default", "openvino-bf16"], "default")][-3:] == [
        "torch", "onnxruntime", "openvino"]  # fmt: skip
    assert not Candidate("x", "openvino-bf16", FULL).is_float32


def test_wrong_settings(command, tmp_path):
    for arguments, message in (
        (("--only", "plain,opnvino"), r"unknown candidate 'opnvino'; expected plain, .*; did you mean 'openvino'?"),
        (("--what", "sped"), r"unknown measurement 'sped'; expected speed, .*; did you mean 'speed'?"),
        (("--batch", "1,x"), r"--batch 1,x: expected numbers with commas between them, such as 1,8"),
        (("--batch", "0"), r"batches must be numbers from 1 to 1024"),
        (("--what", ","), r"nothing is to be measured; expected some of speed, front, training, startup, decode"),
        (("--model", "defualt"), r"unknown model 'defualt'; did you mean 'default'"),
    ):
        code, out, err = command("bench", *arguments, model=None)
        assert (code, out) == (2, ""), err
        assert re.search(message, err[-1]), err
    code, out, err = command("bench", "--json", tmp_path / "no" / "where.json", model=None)
    assert (code, out, len(err)) == (1, "", 1) and "no such folder" in err[0]


def test_absent_packages_are_told(monkeypatch):
    plain, torched, exported, ast, half = (
        Candidate(kind, kind, FULL) for kind in ("plain", "torch", "openvino", "ast", "torch-bf16")
    )
    absent: set[str] = set()
    monkeypatch.setattr(candidates, "has_package", lambda package: package not in absent)
    monkeypatch.setattr(candidates, "has_bfloat16", lambda: True)
    assert [lacking(c, True, False) for c in (plain, torched, exported, ast, half)] == [None] * 5
    absent.add("transformers")
    assert lacking(ast, False, False) == "transformers is not installed: pip install 'htsat[bench]'"
    absent.add("onnxscript")
    assert lacking(exported, True, False) == "onnxscript is not installed: pip install 'htsat[export]'"
    assert lacking(exported, True, True) is None
    absent.add("openvino")
    assert lacking(exported, True, True) == "openvino is not installed: pip install 'htsat[openvino]'"
    assert lacking(torched, False, True).startswith("the model is exported, which PyTorch does not run")
    absent.add("torch")
    assert lacking(plain, True, False) == "torch is not installed: pip install 'htsat[torch]'"
    absent.clear()
    monkeypatch.setattr(candidates, "has_bfloat16", lambda: False)
    assert lacking(half, True, True) == "this processor has no instructions for bfloat16"
    monkeypatch.setattr(candidates.shutil, "which", lambda name: None)
    assert "C++ compiler" in lacking(Candidate("compiled", "compiled", FULL), True, True)


def test_instructions(monkeypatch):
    monkeypatch.setattr(measure, "_cpuinfo", {"flags": "fpu avx2 amx_bf16"}.get)
    assert measure.instructions() == {"avx2", "amx_bf16"} and measure.has_bfloat16()
    monkeypatch.setattr(measure, "_cpuinfo", {"flags": "fpu avx2"}.get)
    assert not measure.has_bfloat16()
    monkeypatch.setattr(measure, "_cpuinfo", {}.get)
    assert measure.instructions() is None and measure.has_bfloat16()


# ------------------------------------------------------------------ networks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny network that can be written plainly."""
    return prepare(Sources("tiny", None, None), tmp_path_factory.mktemp("bench"), False, True, tiny_config())


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model, which is exported already."""
    path, export = resolve("default"), bundled_export("default")
    return prepare(Sources("default", path, export), tmp_path_factory.mktemp("bench"), True, False)


def test_the_plain_network_is_the_same():
    config = tiny_config(labels=tuple("abcde"))
    model = randomised(config)
    waveform = 0.2 * torch.randn(2, config.chunk_samples, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, ours = plain_port_of(model)(waveform), model(waveform)
    repeats = plain["framewise"].shape[1] // ours.framewise_logits.shape[1]
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(plain["clipwise"], ours.clipwise_logits.sigmoid(), **close)
    torch.testing.assert_close(plain["framewise"][:, ::repeats], ours.framewise_logits.sigmoid(), **close)
    torch.testing.assert_close(plain["latent"], ours.embedding, **close)
    assert plain["clipwise"].std() > 0.01  # or anything would agree


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"fine_frames": 4}, "has a fine head"), ({"clip_pooling": "logmeanexp"}, "has another head"),
     ({"frequency_embedding": True}, "makes its tokens otherwise"), ({"architecture": "crnn"}, "is a crnn")],
)  # fmt: skip
def test_what_cannot_be_written_plainly(changes, reason):
    config = tiny_config()
    frontend, model = config.frontend, config.model
    assert unlike(frontend, model) is None
    if "architecture" in changes:
        model = type(model)(num_classes=2, **changes)
    else:
        model = dataclasses.replace(model, **changes)
    assert unlike(frontend, model) == reason
    if "architecture" not in changes and "fine_frames" not in changes:
        with pytest.raises(ConfigError, match=reason):
            plain_port_of(randomised(dataclasses.replace(config, model=model)))


def test_prepared_network(tiny):
    model = randomised(tiny_config())
    assert tiny.parameters == sum(p.numel() for p in model.parameters())
    assert tiny.seconds == 10.0 and 1e-5 <= tiny.tolerance < 1e-4
    parameters, flops = tiny.plain_size
    assert parameters == tiny.parameters
    # A Fourier transform by convolution is all that the plain one has more of, but for the sums of attention.
    front, frames = tiny_config().frontend, 10 * 8000 // tiny_config().frontend.hop_length + 1
    convolution = 2 * 2 * frames * front.n_fft * (front.n_fft // 2 + 1)
    fast = frames * 2.5 * front.n_fft * np.log2(front.n_fft)
    assert flops - tiny.flops == pytest.approx(convolution - fast, rel=0.02)


def test_a_network_is_exported_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(htsat.model.export, "export_onnx", lambda model, config, path: written.append(path))
    found = prepare(Sources("tiny", None, None), tmp_path, True, False, tiny_config())
    assert written == [found.export] == [tmp_path / "tiny.onnx"] and found.plain_size is None


def test_an_exported_file_alone(bundled, tmp_path):
    alone = prepare(Sources("alone", None, bundled.export), tmp_path, True, False)
    assert alone.checkpoint is None and alone.flops is None and alone.parameters == bundled.parameters
    trial = SpeedJob(Candidate("onnxruntime", "onnxruntime", "alone"), alone, threads=1).start()(("try", 1))
    assert trial.clipwise <= alone.tolerance


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", "plain"), ("tiny", "torch"), ("tiny", "torch-bf16"), ("bundled", "torch"), ("bundled", "onnxruntime"),
     ("bundled", "openvino")],
)  # fmt: skip
def test_candidates_say_the_same(request, name, kind):
    if kind == "openvino" and not installed(kind):
        pytest.skip(f"{kind} is not installed")
    subject = request.getfixturevalue(name)
    answer = SpeedJob(Candidate(kind, kind, name), subject, threads=1).start()
    assert answer(("held", 0)) > 0
    trial = answer(("try", 3))
    assert isinstance(trial, Trial) and trial.seconds > 0
    limit = 0.05 if kind.endswith("bf16") else subject.tolerance
    assert 0 <= trial.clipwise <= limit and 0 <= trial.framewise <= limit
    found = answer(("time", 2))
    assert isinstance(found, Sample) and found.wall > 0 and found.peak > 0


@pytest.fixture(scope="module")
def astray(tiny, tmp_path_factory):
    """The same with posteriors that nobody gives."""
    with np.load(tiny.reference) as stored:
        values = dict(stored)
    values["clipwise"] = values["clipwise"] + 1e-4
    path = tmp_path_factory.mktemp("astray") / "reference.npz"
    np.savez(path, **values)
    return dataclasses.replace(tiny, reference=path)


def test_what_says_something_else_is_not_timed(astray):
    answer = SpeedJob(Candidate("mine", "torch", "tiny"), astray, threads=1).start()
    with pytest.raises(BenchError, match=r"^mine: its posteriors differ by 1\.0e-04 .* more than .*; not timed"):
        answer(("try", 1))
    trial = SpeedJob(Candidate("half", "torch-bf16", "tiny"), astray, threads=1).start()(("try", 1))
    assert trial.clipwise > 0


def test_difference():
    exact = [np.array([0.1, 0.5])]
    assert difference([np.array([0.1, 0.25], np.float32)], exact) == 0.25
    with pytest.raises(BenchError, match=r"shape \(1,\), expected \(2,\)"):
        difference([np.zeros(1)], exact)
    with pytest.raises(BenchError, match="not finite"):
        difference([np.array([0.1, np.nan])], exact)
    assert batch_of(np.array([[1], [2]], np.float32), 3).tolist() == [[1], [2], [1]]


# ------------------------------------------------------------------ all of it


@dataclasses.dataclass(frozen=True)
class Pretender:
    """A candidate whose times are known; ``late`` fails when it is timed."""

    name: str
    seconds: float
    late: bool = False

    def start(self):
        calls = []

        def answer(request):
            wanted, batch = request
            calls.append(request)
            if wanted == "held":
                return 1000
            if wanted == "try":
                return Trial(1e-7, 2e-7, 10.0)  # slow: no untimed calls
            if self.late:
                raise BenchError(f"{self.name}: no more")
            timed = sum(call == request for call in calls)
            return Sample(self.seconds * batch * timed, self.seconds * batch, 1000 + 500 * batch)

        return answer


@contextlib.contextmanager
def here(jobs, *_):
    """Let jobs answer in this process."""

    class Worker:
        def __init__(self, job):
            self.name, self.ask = job.name, job.start()

    yield [Worker(job) for job in jobs]


def test_rows_of_known_times(monkeypatch):
    monkeypatch.setattr(htsat.apps.bench.speed, "processes", here)
    failures = []
    jobs = [Pretender("plain", 0.2), Pretender("fast", 0.05), Pretender("late", 0.1, late=True)]
    rows = measure_speed(jobs, [4, 1], 3, nothing, lambda name, error: failures.append(str(error)))
    assert [(row.candidate, row.batch, row.rounds) for row in rows] == [
        ("plain", 1, 3), ("fast", 1, 3), ("plain", 4, 3), ("fast", 4, 3)]  # fmt: skip
    # Each call takes as much longer as there were calls before it: 200, 400, 600 ms.
    assert [(row.median_ms, row.min_ms) for row in rows] == [
        pytest.approx(pair) for pair in ((400, 200), (100, 50), (400, 200), (100, 50))
    ]
    assert [row.added_bytes for row in rows] == [500, 500, 2000, 2000]
    assert rows[0].samples_ms == pytest.approx((200, 400, 600)) and rows[0].clipwise_difference == 1e-7
    assert failures == ["late: no more"]
    table = [dataclasses.asdict(row) for row in rows]
    assert report.ratios(table, "batch", "plain", "median_ms")[("fast", 4)] == pytest.approx(4.0)
    assert report.ratios(table, "batch", "ast", "min_ms") == {}


def test_a_whole_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "busy_now", lambda: 0.5)
    monkeypatch.setattr(htsat.apps.bench.run, "apart", lambda name, function, *arguments: function(*arguments))
    absent = lambda candidate, *_: "not here" if candidate.kind == "ast" else None  # noqa: E731
    monkeypatch.setattr(htsat.apps.bench.run, "lacking", absent)
    monkeypatch.setattr(hardware, "SHAPES", {"small": (64, 64, 64)})
    path = tmp_path / "figures.json"
    code, out, err = command(
        "bench", "--what", "speed", "--only", "plain,onnxruntime,ast", "--rounds", 2, "--batch", "2,1", "--threads", 1,
        "--json", path, model="default",
    )  # fmt: skip
    assert code == 0, err
    assert err[0].startswith("htsat: warning: other programs use 50% of the processors now")
    result = json.loads(path.read_text())
    assert set(result) == {"format", "machine", "speed", "left_out", "failed", "load"} and result["format"] == 1
    assert set(result["load"]) == {"before", "after", "share_of_others", "trusted"} and result["failed"] == {}
    rows = result["speed"]["rows"]
    assert [(row["candidate"], row["batch"], row["rounds"]) for row in rows] == [
        ("onnxruntime", 1, 2), ("onnxruntime", 2, 2)]  # fmt: skip
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] and row["clipwise_difference"] < 1e-4
        assert min(row["samples_ms"]) == row["min_ms"]
    (network,) = result["speed"]["networks"]
    rate = result["speed"]["matrix_rates"][0]
    assert network["network"] == "htsat, default" and rate["precision"] == "float32"
    assert network["floor_ms"]["float32"] == pytest.approx(1000 * network["flops"] / rate["best"])
    for row in rows:
        assert row["matrix_share"] == pytest.approx(network["floor_ms"]["float32"] / row["median_ms"])
    assert f"{rate['best'] / 1e9:.0f} GFLOP/s in float32" in out
    unlike_plain = "it is the published network written plainly, and this model has another head"
    assert result["left_out"] == {"plain": unlike_plain, "ast": "not here"}
    assert "htsat: ast is left out: not here" in err and "left out: ast: not here" in out
    assert "| onnxruntime |     1 |" in out and f"torch {torch.__version__}" in out


FOOTER = {
    "machine": {"processor": "X", "cores": 2, "instructions": [], "threads": 2, "date": "D", "versions": {}},
    "left_out": {},
    "failed": {"ast": "ast: broke"},
    "load": {"before": [1.0, 2.0, 3.0], "after": [0.5, 0.5, 0.5], "share_of_others": 0.03, "trusted": True},
}


def test_tables():
    rows = [
        {"network": name, "precision": "float32", "batch": batch, "rounds": 3, "median_ms": ms, "min_ms": ms,
         "processor_ms": ms, "peak_bytes": 2e9, "peak_bytes_small": 1e9}
        for name, batch, ms in (("torch", 8, 50.0), ("ast", 2, 1000.0))
    ]  # fmt: skip
    result = {
        "training": {"unit": "10-s clip", "rows": rows},
        "startup": [{"command": "htsat --help", "rounds": 5, "median_s": 0.123, "min_s": 0.1}],
        "decode": [{"format": "wav", "rounds": 5, "median_s": 0.06, "min_s": 0.05, "times_real_time": 1000.0}],
        **FOOTER,
    }  # fmt: skip
    lines = report.text(result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert ["torch", "float32", "8", "50.0", "50.0", "50.0", "5.0%", "5.0%", "5.0%", "2.00", "1.00", "3"] in cells
    assert ["htsat --help", "0.12", "0.10", "5"] in cells and ["wav", "1000", "60.0", "50.0", "5"] in cells
    assert "share of the processors that other programs used meanwhile: 3%" in lines and "failed: ast: broke" in lines
    assert {len(line) for line in lines[2:6]} == {len(lines[2])}  # of one table


# ------------------------------------------------------------------ the hardware's limit, and the front end


def test_rates_of_matrix_products(monkeypatch):
    """Two ways to compute a product of 2000 operations, of 1, 2 and 4 microseconds, and of 3, 3 and 0.5."""
    seconds = {"product": iter([9e-6, 1e-6, 2e-6, 4e-6]), "layer": iter([9e-6, 3e-6, 3e-6, 0.5e-6])}
    order = iter(["product", "layer"] * 4)
    monkeypatch.setattr(hardware, "SHAPES", {"x": (10, 10, 10)})
    monkeypatch.setattr(hardware, "_seconds", lambda call: next(seconds[next(order)]))
    (rate,) = hardware.measure_rates(torch.get_num_threads(), ["float32"], rounds=3)
    # Medians of the rates: 2000 / 2 us and 2000 / 3 us; best of all: 2000 / 0.5 us.
    assert rate == hardware.MatrixRate("float32", pytest.approx(4e9), (
        hardware.ShapeRate("x", pytest.approx(1e9), pytest.approx(4e9)),))  # fmt: skip


def test_the_better_of_two_measurements():
    slow, fast = hardware.MatrixRate("float32", 1.0, ()), hardware.MatrixRate("float32", 2.0, ())
    assert hardware.faster([slow, fast], [fast, slow]) == [fast, fast] and hardware.faster([], []) == []


def test_no_rate_beats_the_processor():
    rates = hardware.measure_rates(torch.get_num_threads(), ["float32", "bfloat16"], rounds=1)
    assert [rate.precision for rate in rates] == ["float32", "bfloat16"]
    for rate in rates:
        assert [found.shape for found in rate.shapes] == list(hardware.SHAPES)
        assert 0 < rate.shapes[0].median <= rate.shapes[0].best <= rate.best < 1e15


@pytest.mark.parametrize("way", front.WAYS)
def test_every_front_end_says_the_same(way, tmp_path):
    if way == "openvino" and not installed(way):
        pytest.skip(f"{way} is not installed")
    config, path = FrontendConfig(), tmp_path / "front.onnx"
    if way in ("onnxruntime", "openvino"):
        front.write_graph(config, 8000, path)
    answer = front.FrontJob(way, config, 8000, torch.get_num_threads(), path).start()
    waveform = (0.1 * np.random.default_rng(0).standard_normal((1, 8000))).astype(np.float32)
    np.testing.assert_allclose(answer("said")[0], log_mel(waveform[0], config), atol=1e-3)
    assert answer("time").wall > 0


def test_front_ends_of_known_times(monkeypatch):
    monkeypatch.setattr(front, "processes", here)
    times = {"torch": [9.0, 0.001, 0.003, 0.002], "openvino": [9.0, 0.004, 0.004, 0.005]}

    @dataclasses.dataclass(frozen=True)
    class Timed:
        name: str

        def start(self):
            left = iter(times[self.name])
            return lambda request: Sample(seconds := next(left), 2 * seconds, 0)

    rows = front.measure_front([Timed("torch"), Timed("openvino")], 3, nothing, nothing)
    assert rows == [
        front.FrontRow("torch", 3, pytest.approx(2.0), pytest.approx(1.0), pytest.approx(2.0)),
        front.FrontRow("openvino", 3, pytest.approx(4.0), pytest.approx(4.0), pytest.approx(8.0)),
    ]
    table = report.text(
        {"front": {"unit": "10-s clip", "rows": [dataclasses.asdict(row) for row in rows]}} | FOOTER
    ).splitlines()
    assert "| torch     |      2.00 |   1.00 |         2.00 |      3 |" in table


def test_ways_that_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(htsat.apps.bench.run, "has_package", lambda package: package not in ("openvino", "onnx"))
    monkeypatch.setattr(front, "processes", here)
    notes = []
    result = run(Settings(("front",), (), (1,), torch.get_num_threads(), 1), nothing, notes.append)
    assert [row["way"] for row in result["front"]["rows"]] == ["convolution", "torch"]
    assert notes == [
        "front end, onnxruntime is left out: export needs other packages: pip install 'htsat[export]'",
        "front end, openvino is left out: openvino is not installed: pip install 'htsat[openvino]'",
    ]


# ------------------------------------------------------------------ training, start, reading


@pytest.mark.parametrize("network", ["plain", "torch"])
@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_training_steps(network, precision):
    config = tiny_config()
    job = training.TrainingJob(network, 2, precision, 1, config.frontend, config.model)
    step = job.start()
    first, second = step(None), step(None)
    assert np.isfinite(first.loss) and second.loss < first.loss + 0.1
    assert min(second.passes, second.optimiser, second.processor_passes, second.peak) > 0


def test_clips_of_a_training_step():
    """AST steps on 2 clips where others have 8: its passes are divided by 2, its optimiser by 8."""
    config = tiny_config()
    job = training.TrainingJob("ast", 2, "float32", 1, config.frontend, config.model)
    steps = [training.Step(4.0, 0.8, 8.0, 1.6, 5, 0.1), training.Step(2.0, 0.8, 6.0, 1.6, 5, 0.1)]
    row = training._row(job, 8, steps, 7, 6)
    assert (row.median_ms, row.min_ms, row.processor_ms) == pytest.approx((1600, 1100, 3200))
    assert (row.batch, row.peak_bytes, row.peak_bytes_small) == (2, 7, 6)


def test_whole_commands(monkeypatch):
    assert 0 < files.whole("pass", [sys.executable, "-c", "pass"]) < 60
    with pytest.raises(BenchError, match=r"^bad: ended with code 3 \(oh\)$"):
        files.whole("bad", [sys.executable, "-c", "import sys; print('oh', file=sys.stderr); sys.exit(3)"])
    commands = files.startup_commands(files.Path("clip.wav"), ["onnxruntime"], False)
    assert list(commands) == ["python -c pass", "htsat --help", "htsat tag, onnxruntime"]
    seconds = iter([9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 3.0, 2.0, 5.0])  # the first round fills caches
    monkeypatch.setattr(files, "whole", lambda name, command: next(seconds))
    monkeypatch.setattr(files, "apart", nothing)
    rows = files.measure_startup(["onnxruntime"], False, 2, nothing)
    assert [(row.median_s, row.min_s, row.rounds) for row in rows] == [(2.0, 1.0, 2), (2.0, 2.0, 2), (4.0, 3.0, 2)]


def test_reading_every_format():
    found = files.read_formats(2, 1.5)
    assert list(found) == ["wav", "flac", "ogg", "mp3"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


def test_one_measurement_that_fails_loses_no_other(monkeypatch):
    def broken(*_):
        raise BenchError("reading: broke")

    notes = []
    monkeypatch.setattr(htsat.apps.bench.run, "measure_decode", broken)
    monkeypatch.setattr(htsat.apps.bench.run, "measure_startup", lambda *_: [files.StartupRow("x", 1, 2.0, 1.0)])
    result = run(Settings(("decode", "startup"), (), (1,), 1), nothing, notes.append)
    assert result["failed"] == {"decode": "reading: broke"} and notes == ["reading: broke"]
    assert (
        result["startup"] == [{"command": "x", "rounds": 1, "median_s": 2.0, "min_s": 1.0}] and "decode" not in result
    )


def test_training_of_a_model(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(training, "processes", here)
    settings = Settings(("training",), ("torch", "plain"), (1, 2), 1, 1, str(tiny_checkpoint))
    result = run(settings, nothing, nothing)["training"]
    assert result["unit"] == "10-s clip" and [(r["network"], r["precision"], r["batch"]) for r in result["rows"]] == [
        (name, precision, 2) for precision in ("float32", "bfloat16") for name in ("plain", "torch")
    ]


def test_encoders_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "encoder.safetensors", tiny_config(()))
    with pytest.raises(UsageError, match="has no classes, it gives embeddings only"):
        run(Settings(("speed",), ("torch",), (1,), 1, 1, str(path)), nothing, nothing)
