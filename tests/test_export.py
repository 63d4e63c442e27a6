"""Exported models against the networks they were made of, and the files that are none."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import htsat
import htsat.cli
from htsat.audio.mel import log_mel
from htsat.backends import SparingBackend, installed, open_model, usable
from htsat.config import CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.errors import CheckpointError, ConfigError, OutputError, UsageError
from htsat.model import export as export_module
from htsat.model.architectures import build_model
from htsat.model.checkpoint import save_checkpoint
from htsat.model.export import MatrixLogMel, export_onnx
from htsat.model.exported import OnnxBackend, OpenVinoBackend, read_exported

ASSETS = Path(htsat.__file__).parent / "assets"
EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "patch_size": 8, "num_classes": 3}


def network(seed=0, inference=None, frontend=None, **changes):
    """A small network with weights that make its outputs differ, and its configuration."""
    frontend = frontend or FrontendConfig()
    config = CheckpointConfig(
        frontend,
        ModelConfig(**(SMALL | changes)),
        labels=tuple("abcdefghij"[: (SMALL | changes)["num_classes"]]),
        inference=inference or InferenceConfig(),
    )
    return varied(config, seed), config


def varied(config, seed=0):
    """A network whose outputs differ, and that hears as trained ones do: mel bins of about the same spread."""
    torch.manual_seed(seed)
    model = build_model(config.frontend, config.model).eval()
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "norm" not in name) or name.startswith(("fine.out", "token_semantic")):
            parameter.data.normal_(0, 0.1)
    model.mel_norm.running_mean.fill_(-30.0)
    model.mel_norm.running_var.fill_(400.0)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Path, network and configuration of one export."""
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    model, config = network(fine_frames=4)
    export_onnx(model, config, path)
    return path, model, config


def waveforms(config, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((count, config.heard_samples))).astype(np.float32)


def expected(model, chunks):
    """What the network says in double precision, so that only the export's rounding shows."""
    with torch.inference_mode():
        output = copy.deepcopy(model).double()(torch.from_numpy(chunks).double(), "native")
    return [t.numpy() for t in (output.clipwise_logits, output.framewise_logits, output.embedding)]


# ------------------------------------------------------------------ the front end as matrices


@pytest.mark.parametrize(
    "config",
    [
        FrontendConfig(),
        FrontendConfig(sample_rate=16000, hop_length=160, f_max=8000.0),
        FrontendConfig(sample_rate=48000, hop_length=480, mel_scale="htk"),
        FrontendConfig(n_fft=512, hop_length=100, f_max=16000.0),
        FrontendConfig(n_fft=600, hop_length=250),
        FrontendConfig(n_fft=1022, hop_length=320),
    ],
    ids=lambda config: f"{config.sample_rate}-{config.n_fft}-{config.hop_length}",
)
def test_matrix_front_end_is_the_reference(config):
    rng = np.random.default_rng(1)
    time = np.arange(8000) / config.sample_rate
    quiet_beside_loud = 0.9 * np.sin(2 * np.pi * 1000 * time) + 1e-4 * rng.standard_normal(8000)
    for waveform in (0.1 * rng.standard_normal(8000), quiet_beside_loud, np.zeros(8000)):
        found = MatrixLogMel(config, 8000)(torch.from_numpy(waveform).float()[None])[0].numpy()
        wanted = log_mel(waveform, config)
        assert found.shape == wanted.shape
        # In single precision noise lies 130 dB below what is loudest.
        heard = wanted > wanted.max() - 80
        np.testing.assert_allclose(found[heard], wanted[heard], atol=5e-3)
        assert (found[~heard] < wanted.max() - 79).all()


def test_matrix_front_end_takes_each_frequency_once():
    config = FrontendConfig()
    filters = MatrixLogMel(config, 8000).filters.sum(0)
    np.testing.assert_allclose(filters, export_module.mel_filterbank(config).sum(0), rtol=1e-6)


def test_odd_transforms_are_refused():
    with pytest.raises(ConfigError, match="n_fft 1001 is odd"):
        MatrixLogMel(FrontendConfig(n_fft=1001), 8000)


# ------------------------------------------------------------------ graphs


def test_export_says_what_the_network_says(small):
    path, model, config = small
    chunks = waveforms(config)
    wanted = expected(model, chunks)
    for backend in (OnnxBackend(path, config, threads=1), OpenVinoBackend(path, config, threads=1)):
        found = backend(chunks)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=2e-4)
    # what the comparison is worth: the clips differ
    assert np.abs(wanted[0][0] - wanted[0][1]).max() > 1e-3


def test_a_clip_has_the_same_bits_in_any_batch(small):
    path, _, config = small
    chunks = waveforms(config, 4)
    backend = OnnxBackend(path, config, threads=1)
    whole = backend(chunks)
    for i in range(4):
        for a, b in zip(backend(chunks[i : i + 1]), whole, strict=True):
            assert a[0].tobytes() == b[i].tobytes()


def test_graph_takes_batches_of_any_size(small):
    path, model, config = small
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        chunks = waveforms(config, count)
        found = session.run(None, {"waveform": chunks})
        np.testing.assert_allclose(found[1], expected(model, chunks)[1], atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "cnn14", "cnn_width": 4, "decision": "att"},
        {"architecture": "crnn", "cnn_width": 4},
        {"stem": "conv", "frequency_embedding": True},
        {"num_classes": 0},
        {"token_semantic": False},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_networks(changes, tmp_path):
    own = {"num_classes": 3} if changes.get("architecture") else SMALL
    config = CheckpointConfig(
        FrontendConfig(),
        ModelConfig(**(own | changes)),
        labels=tuple("abc"[: changes.get("num_classes", 3)]),
    )
    model = varied(config)
    report = export_onnx(model, config, tmp_path / "model.onnx")
    assert report.posterior_difference < 1e-5
    clip, frame, embedding = OnnxBackend(tmp_path / "model.onnx", config, threads=1)(waveforms(config, 1))
    assert clip.shape == (1, config.model.num_classes)
    assert frame.shape[0] == 1 and frame.shape[2] == config.model.num_classes
    assert embedding.shape[0] == 1


def test_part_of_a_chunk(tmp_path):
    model, config = network(inference=InferenceConfig(chunk_part=4, hop_seconds=1.0))
    export_onnx(model, config, tmp_path / "part.onnx")
    chunks = waveforms(config)
    assert chunks.shape[1] == 80_000
    found = OnnxBackend(tmp_path / "part.onnx", config, threads=1)(chunks)
    np.testing.assert_allclose(found[1], expected(model, chunks)[1], atol=2e-4)


def test_configuration_travels_in_the_file(small):
    path, _, config = small
    assert read_exported(path) == config


def test_recordings_at_their_own_length_become_padded(tmp_path):
    model, config = network(inference=InferenceConfig(short="native"))
    export_onnx(model, config, tmp_path / "native.onnx")
    assert read_exported(tmp_path / "native.onnx").inference.short == "pad"


def test_an_export_that_says_something_else_is_not_written(small, tmp_path, monkeypatch):
    _, model, config = small
    monkeypatch.setattr(export_module, "_differences", lambda *_: (1e-3, 1e-6))
    with pytest.raises(OutputError, match=r"not written: its posteriors differ by 1.0e-03"):
        export_onnx(model, config, tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_the_comparison_sees_other_weights(small):
    path, _, config = small
    other, _ = network(seed=5, fine_frames=4)
    found, own = export_module._differences(other, config, path)
    assert found > 1e-3 > own


def test_weights_are_halved_where_nothing_is_lost(tmp_path):
    model, config = network()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    report = export_onnx(model, config, tmp_path / "half.onnx")
    full, _ = network()
    assert report.size < 0.9 * export_onnx(full, config, tmp_path / "full.onnx").size


# ------------------------------------------------------------------ the bundled model


def test_bundled_export_is_the_bundled_checkpoint():
    for path in sorted(EXAMPLES.glob("*.ogg")):
        found = htsat.Predictor("default", backend="onnxruntime", threads=1).predict(path)
        wanted = htsat.Predictor("default", backend="torch", threads=1).predict(path)
        # PyTorch's own rounding is 3e-5 here, that of the export less than 1e-6.
        np.testing.assert_allclose(found.framewise_posteriors, wanted.framewise_posteriors, atol=1e-4)
        np.testing.assert_allclose(found.clipwise_posteriors, wanted.clipwise_posteriors, atol=1e-4)
        assert [e.event_label for e in found.events] == [e.event_label for e in wanted.events]
    assert read_exported(ASSETS / "default.onnx") == htsat.Predictor("default", backend="torch").config


def test_bfloat16_stays_within_its_budget():
    recording = EXAMPLES / "street.ogg"
    exact = htsat.Predictor("default", backend="torch").predict(recording)
    rounded = [htsat.Predictor("default", backend="torch", precision="bfloat16")]
    if "BF16" in __import__("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        rounded.append(htsat.Predictor("default", backend="openvino", precision="bfloat16"))
    for predictor in rounded:
        found = predictor.predict(recording)
        difference = np.abs(found.framewise_posteriors - exact.framewise_posteriors)
        assert 0 < difference.max() < 0.1
        assert difference.mean() < 2e-3


def test_no_torch_is_needed():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import htsat\n"
        f"p = htsat.Predictor('default').predict({str(EXAMPLES / 'rain_and_clock.ogg')!r})\n"
        "print(p.tags[0].label, htsat.Predictor('default').backend)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["clock_tick", "onnxruntime"], done.stderr


# ------------------------------------------------------------------ which backend


def test_exported_files_run_without_the_checkpoint(small):
    path, _, config = small
    predictor = htsat.Predictor(path, threads=1)
    assert predictor.backend == "onnxruntime"
    chunk = waveforms(config, 1)[0]
    prediction = predictor.predict((chunk, config.frontend.sample_rate))
    assert prediction.framewise_posteriors.shape == (256, 3)


def test_usable_backends(small, tmp_path):
    path, model, config = small
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model, config)
    assert usable(path, path) == ["onnxruntime", "openvino"]
    assert usable(checkpoint, checkpoint) == ["torch", "compiled"]
    assert usable("default", ASSETS / "default.safetensors") == ["onnxruntime", "torch", "compiled", "openvino"]


def test_the_fastest_installed_backend_is_chosen(small, monkeypatch):
    path, _, _ = small
    here = {"torch", "compiled", "onnxruntime", "openvino"}
    monkeypatch.setattr("htsat.backends.installed", lambda name: name in here)
    assert open_model(path).name == "onnxruntime"
    monkeypatch.setattr("htsat.backends._LARGE", 1)
    assert open_model(path).name == "openvino"
    here.discard("openvino")
    assert open_model(path).name == "onnxruntime"
    monkeypatch.setattr("htsat.backends._has_gpu", lambda: True)
    assert open_model("default", device="cpu").name == "onnxruntime"
    assert open_model("default").name == "torch"
    here -= {"onnxruntime"}
    monkeypatch.setattr("htsat.backends._has_gpu", lambda: False)
    assert open_model("default").name == "torch"
    here.clear()
    with pytest.raises(UsageError, match="bfloat16 needs the backend openvino or torch"):
        open_model("default", precision="bfloat16")
    with pytest.raises(UsageError, match=r"running a checkpoint needs PyTorch: pip install 'htsat\[torch\]'"):
        open_model("default")
    with pytest.raises(UsageError, match="the backend onnxruntime is not installed: pip install onnxruntime"):
        open_model(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tensorrt"}, "unknown backend 'tensorrt'; expected auto, torch, compiled, onnxruntime, openvino"),
        ({"precision": "int3"}, "unknown precision 'int3'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"backend": "torch"}, "is exported, which torch does not run"),
        ({"backend": "onnxruntime", "device": "cuda"}, "runs on the CPU, not on 'cuda'; use --backend torch"),
        ({"backend": "onnxruntime", "precision": "bfloat16"}, "computes in float32; use --backend openvino"),
    ],
)
def test_what_cannot_be_run_so(small, settings, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        open_model(small[0], **settings)


def test_checkpoints_are_exported_first(small, tmp_path):
    _, model, config = small
    save_checkpoint(tmp_path / "model.safetensors", model, config)
    with pytest.raises(UsageError, match=r"export it first: htsat export model.safetensors model.onnx"):
        open_model(tmp_path / "model.safetensors", backend="openvino")
    with pytest.raises(UsageError, match="is an exported model, which has no PyTorch network"):
        htsat.load_model(small[0])


def test_own_length_needs_torch(small):
    path, _, _ = small
    assert htsat.Predictor("default", inference=InferenceConfig(short="native")).backend == "torch"
    predictor = htsat.Predictor(path, inference=InferenceConfig(short="native"))
    with pytest.raises(UsageError, match=r"hears 320000 samples at once, got 40000; use --short pad or tile"):
        predictor.predict((np.zeros(30_000, np.float32), 32_000))


def test_a_processor_without_bfloat16(small, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(UsageError, match="this processor has no instructions for bfloat16; use --precision float32"):
        open_model(small[0], backend="openvino", precision="bfloat16")


def test_backends_that_are_absent(small, monkeypatch):
    for package, backend in (("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"the backend {backend} is not installed: pip install"):
            (OnnxBackend if backend == "onnxruntime" else OpenVinoBackend)(small[0], small[2])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"export needs the package onnxscript: pip install 'htsat\[export\]'"):
        export_onnx(small[1], small[2], small[0])


@pytest.mark.slow
def test_compiled_by_pytorch():
    recording = EXAMPLES / "rain_and_clock.ogg"
    exact = htsat.Predictor("default", backend="torch").predict(recording)
    found = htsat.Predictor("default", backend="compiled").predict(recording)
    np.testing.assert_allclose(found.framewise_posteriors, exact.framewise_posteriors, atol=1e-4)


def test_a_compiler_that_fails(small, tmp_path, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    _, model, config = small
    save_checkpoint(tmp_path / "model.safetensors", model, config)

    def fail(*_):
        raise TorchDynamoException("no C++ compiler\nand much more")

    runner = open_model(tmp_path / "model.safetensors", backend="torch")
    monkeypatch.setattr(runner.backend.backend, "_model", fail)
    with pytest.raises(UsageError, match=r"cannot compile the network here \(no C\+\+ compiler\); .*--backend torch"):
        runner.backend(waveforms(config, 1))


def test_installed_looks_without_importing():
    assert installed("torch") and installed("onnxruntime")


# ------------------------------------------------------------------ too little memory


class Small:
    """A backend that holds so many chunks at once, and fails in the words of a runtime."""

    def __init__(self, most, error):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, chunks):
        self.sizes.append(len(chunks))
        if len(chunks) > self.most:
            raise self.error
        return chunks[:, :2], chunks[:, None, :2], chunks[:, 2:]


def test_a_smaller_batch_where_memory_is_short():
    backend, notes = Small(3, RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nsecond line")), []
    sparing = SparingBackend(backend, notes.append)
    chunks = np.arange(35, dtype=np.float32).reshape(7, 5)
    for sizes in ([7, 3, 3, 1], [3, 3, 1]):  # the second time it is known
        backend.sizes.clear()
        clip, frame, embedding = sparing(chunks)
        assert backend.sizes == sizes
        np.testing.assert_array_equal(clip, chunks[:, :2])
        np.testing.assert_array_equal(frame, chunks[:, None, :2])
        np.testing.assert_array_equal(embedding, chunks[:, 2:])
    backend.most = 1
    sparing(chunks)
    assert notes == ["too little memory for 7 chunks at once, so fewer are heard at once"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
        RuntimeError("Exception from src/inference/src/cpp/core.cpp:117:\nstd::bad_alloc"),
        MemoryError(),
    ],
    ids=str,
)
def test_too_little_memory_for_one_chunk(error):
    backend = Small(0, error)
    with pytest.raises(MemoryError, match=r"^no memory for a batch of 1: "):
        SparingBackend(backend)(np.zeros((4, 5), np.float32))
    assert backend.sizes == [4, 2, 1]
    backend.error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        SparingBackend(backend)(np.zeros((4, 5), np.float32))
    assert backend.sizes == [4, 2, 1, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_a_process_whose_memory_is_limited(backend):
    """Whatever a limit leaves: the answer, or a MemoryError, and the same answer once there is memory again."""
    script = f"""if True:
        import resource
        import numpy as np
        from htsat.backends import open_model
        run = open_model("default", backend={backend!r}, threads=1).backend
        chunks = (0.1 * np.random.default_rng(0).standard_normal((16, 320000))).astype(np.float32)
        if {backend != "onnxruntime"}:  # whose arena would keep what it needs
            wanted = run(chunks[:1])
        short, hard = 0, resource.getrlimit(resource.RLIMIT_AS)[1]
        for megabytes in (0, 1, 4, 16):
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 1_000_000, hard))
            try:
                run(chunks)
            except MemoryError:
                short += 1
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        found = run(chunks[:1])
        if {backend != "onnxruntime"}:
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        print("short", short)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("short "), done.stderr
    # OpenVINO has all it needs once it ran.
    assert backend == "openvino" or int(done.stdout.split()[1]) > 0


# ------------------------------------------------------------------ files that are no export of ours


def changed(small, tmp_path, change):
    """Return a copy of the export after ``change`` on its ONNX message."""
    proto = onnx.load(small[0])
    change(proto)
    path = tmp_path / "changed.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        htsat.Predictor(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_file_of_another_program(small, tmp_path):
    def bare(proto):
        del proto.metadata_props[:]

    refused(changed(small, tmp_path, bare), "is an ONNX file of another program")


def test_file_with_external_weights(small, tmp_path):
    def moved(proto):
        tensor = proto.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../../etc/passwd"

    refused(changed(small, tmp_path, moved), "its weights lie in another file")


def test_file_of_a_newer_version(small, tmp_path):
    def newer(proto):
        proto.ir_version = 99

    refused(changed(small, tmp_path, newer), "ONNX version 99 is not known here")

    def newer_config(proto):
        values = json.loads(proto.metadata_props[0].value)
        proto.metadata_props[0].value = json.dumps(values | {"format": 99})

    refused(changed(small, tmp_path, newer_config), "checkpoint format 99 is newer than this htsat reads")


def test_labels_that_do_not_fit(small, tmp_path):
    def relabelled(proto):
        values = json.loads(proto.metadata_props[0].value)
        values["labels"] = ["a", "b"]
        values["model"]["num_classes"] = 2
        proto.metadata_props[0].value = json.dumps(values)

    refused(changed(small, tmp_path, relabelled), "gives 3 classes where its labels name 2")


def test_front_end_that_does_not_fit(small, tmp_path):
    def faster(proto):
        values = json.loads(proto.metadata_props[0].value)
        values["frontend"] |= {"sample_rate": 16000, "hop_length": 160, "f_max": 8000.0}
        proto.metadata_props[0].value = json.dumps(values)

    refused(changed(small, tmp_path, faster), "takes 320000 samples where its settings make 160000")


def test_other_names_inside(small, tmp_path):
    def renamed(proto):
        for node in proto.graph.node:
            node.input[:] = ["audio" if name == "waveform" else name for name in node.input]
        proto.graph.input[0].name = "audio"

    refused(changed(small, tmp_path, renamed), "takes audio and gives clipwise_logits")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_damaged_graphs(small, tmp_path, backend):
    def broken(proto):
        proto.graph.node[5].op_type = "NoSuchOperator"

    path = changed(small, tmp_path, broken)
    with pytest.raises(CheckpointError, match="cannot run it"):
        open_model(path, backend=backend)


def test_files_that_are_not_onnx(small, tmp_path):
    path = tmp_path / "some.onnx"
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"RIFF....WAVEfmt ")
    refused(path, "is no ONNX file, or damaged")
    content = small[0].read_bytes()
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        refused(path, "is no ONNX file, or damaged or cut off")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError):
        htsat.Predictor(path)


def test_random_bytes_never_crash_the_reader(small, tmp_path):
    rng = np.random.default_rng(0)
    content = np.frombuffer(small[0].read_bytes()[:5000], np.uint8)
    path = tmp_path / "noise.onnx"
    for _ in range(200):
        noisy = content.copy()
        noisy[rng.integers(0, len(noisy), 20)] = rng.integers(0, 256, 20)
        path.write_bytes(noisy.tobytes())
        with pytest.raises(CheckpointError):
            read_exported(path)


# ------------------------------------------------------------------ the commands


@pytest.fixture
def htsat_command(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["htsat", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            htsat.cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


def test_export_and_detect(small, tmp_path, htsat_command):
    _, model, config = small
    save_checkpoint(tmp_path / "model.safetensors", model, config)
    target = tmp_path / "model.onnx"
    code, out, err = htsat_command("export", tmp_path / "model.safetensors", target)
    assert (code, out.strip()) == (0, str(target)) and "posteriors differ by at most" in err
    tables = [
        htsat_command("detect", "--model", path, "--threshold", "0.5", "--threads", 1, EXAMPLES / "street.ogg")[:2]
        for path in (target, tmp_path / "model.safetensors")
    ]
    assert tables[0] == tables[1] and tables[0][0] == 0 and tables[0][1].count("\n") > 1
    code, out, _ = htsat_command("info", "--json", target)
    assert json.loads(out)["backends"] == ["onnxruntime", "openvino"]
    assert json.loads(out)["labels"] == ["a", "b", "c"]
    for wrong, message in ((tmp_path / "model.tflite", "ending in .onnx"), (tmp_path / "no" / "m.onnx", "no such fol")):
        code, out, err = htsat_command("export", tmp_path / "model.safetensors", wrong)
        assert code != 0 and not out and message in err


def test_auto_tells_what_it_takes(htsat_command):
    code, _, err = htsat_command("tag", "--backend", "auto", EXAMPLES / "street.ogg")
    assert (code, err) == (0, "htsat: runs on onnxruntime\n")
    code, _, err = htsat_command("tag", EXAMPLES / "street.ogg")
    assert (code, err) == (0, "")
    code, _, err = htsat_command("tag", "--short", "native", "--backend", "auto", EXAMPLES / "street.ogg")
    assert code == 0 or "use --short pad or tile" in err


def test_packages_that_are_absent_are_named(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None; import htsat.cli\n"
        f"sys.argv = ['htsat', 'export', 'default', {str(tmp_path / 'x.onnx')!r}]; htsat.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "htsat: this needs torch, which is not installed: pip install 'htsat[torch]'\n"
