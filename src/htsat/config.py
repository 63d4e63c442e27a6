"""Configuration that travels with the weights: a closed schema with bounds.

Every section is a frozen dataclass. ``from_dict`` refuses unknown keys (naming the nearest
known one), wrong types and values out of range, before anything is allocated: a
configuration may come from an untrusted file. Nothing here is imported by name or executed.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from htsat.errors import ConfigError, UsageError, nearest

T = TypeVar("T")


def _convert(value: Any, expected: Any, where: str) -> Any:
    """Return ``value`` as type ``expected``, or raise ConfigError naming ``where``."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        if value not in typing.get_args(expected):
            allowed = ", ".join(map(repr, typing.get_args(expected)))
            hint = nearest(str(value), map(str, typing.get_args(expected)))
            raise ConfigError(f"{where}: expected one of {allowed}, got {value!r}{hint}")
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(expected)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(o for o in options if o is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(expected)[0]
        return tuple(_convert(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        item = typing.get_args(expected)[1]
        return {str(k): _convert(v, item, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(expected):
        if isinstance(value, expected):  # type: ignore[arg-type]
            return value
        return from_dict(typing.cast(type, expected), value, where)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected a finite number, got one of {value.bit_length()} bits") from None
    if expected is Any:
        return value
    if not isinstance(value, expected) or (expected in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {expected.__name__}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")
    return value


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """Build dataclass ``cls`` from a mapping of plain values.

    Args:
        cls: a dataclass whose fields have plain, tuple, dict, Literal or dataclass types.
        values: the mapping, e.g. parsed JSON or TOML.
        where: prefix of error messages, e.g. ``"model.safetensors: model"``.

    Raises:
        ConfigError: unknown or missing key, wrong type, or value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table of settings, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {key!r}{nearest(str(key), fields) or '; known: ' + ', '.join(fields)}"
            )
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing")
    converted = {k: _convert(v, hints[k], f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON-able values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return {k: plain(v) for k, v in dataclasses.asdict(config).items()}


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, got {str(value)[:20]}")


@dataclass(frozen=True)
class FrontendConfig:
    """Log-mel spectrogram. Defaults: the published 32-kHz front end (100 frames a second)."""

    sample_rate: int = 32000
    """Hz; audio is resampled to this rate before it reaches the model."""
    n_fft: int = 1024
    """Samples per STFT window (Hann, centred, reflect padding)."""
    hop_length: int = 320
    """Samples between STFT frames."""
    n_mels: int = 64
    """Mel bins."""
    f_min: float = 50.0
    """Hz, lower edge of the lowest mel filter."""
    f_max: float = 14000.0
    """Hz, upper edge of the highest mel filter (filters above half the sample rate stay empty, as published)."""
    floor_db: float = -100.0
    """Lowest value of the spectrogram, dB (published: -100)."""
    mel_scale: Literal["slaney", "htk"] = "slaney"
    """``slaney`` (area-normalised, as published) or ``htk`` (unnormalised, the fused CLAP towers)."""

    def __post_init__(self) -> None:
        _check("sample_rate", self.sample_rate, 1000, 384000)
        _check("n_fft", self.n_fft, 16, 16384)
        _check("hop_length", self.hop_length, 1, self.n_fft)
        _check("n_mels", self.n_mels, 8, 512)
        _check("f_min", self.f_min, 0, self.sample_rate / 2)
        _check("f_max", self.f_max, self.f_min + 1, self.sample_rate)
        _check("floor_db", self.floor_db, -200, 0)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. Defaults: the published tiny variant of HTS-AT (31 M parameters with 527 classes).

    A setting that means nothing to the architecture must keep its default (``USED_BY``).
    """

    num_classes: int = 527
    """Outputs; 0 builds the encoder alone (CLAP audio towers)."""
    architecture: Literal["htsat", "cnn14", "crnn"] = "htsat"
    """``htsat``, or a baseline trained and used in the same way: ``cnn14`` (PANNs) or ``crnn`` (DCASE task 4)."""
    embed_dim: int = 96
    """Width of the first stage; it doubles with every stage."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks per stage."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads per stage."""
    window_size: int = 8
    """Side of an attention window in tokens."""
    patch_size: int = 4
    """Side of a patch in log-mel cells."""
    stem: Literal["patch", "conv"] = "patch"
    """How patches become tokens: a linear projection (``patch``, published) or a few convolutions (``conv``)."""
    image_size: int = 256
    """Side of the square that the log-mel spectrogram is folded to."""
    frequency_embedding: bool = False
    """Add to each token a learned vector of its mel rows (published: no; only the batch norm tells frequencies)."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers relative to their input."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the last block in training, rising linearly from 0."""
    token_semantic: bool = True
    """True: the token-semantic head; False: the paper's head without it (mean token, then linear)."""
    clip_pooling: Literal["mean", "logmeanexp"] = "mean"
    """How token logits become clip logits: ``mean`` (published) or ``logmeanexp`` (a smooth maximum)."""
    fine_frames: int = 0
    """Log-mel frames per time step of the fine head, which a token must hold a whole number of; 4 are 39 ms in the
    published front end. 0: there is none, and the framewise output has the time steps of the tokens."""
    fine_width: int = 96
    """Width of the fine head."""
    chunk_seconds: float = 10.0
    """Seconds of sound that the network takes at once. Their log-mel frames are stretched by a constant factor: to fill
    the square or, for the baselines, to the next multiple of 32 (and not at all if they are one)."""
    decision: Literal["max", "att", "clip"] = "max"
    """cnn14: a clip is its most probable frame (``max``, published as Cnn14_DecisionLevelMax), a mean of its frames
    weighted by attention (``att``, Cnn14_DecisionLevelAtt), or classified as a whole (``clip``, Cnn14)."""
    cnn_width: int | None = None
    """cnn14, crnn: channels of the first convolutions, of which the last have 32 and 8 times as many; None: as
    published, 64 and 16."""
    cnn_dropout: float | None = None
    """cnn14, crnn: rate of dropout after each block of convolutions in training; None: as published, 0.2 and 0.5."""
    head_dropout: float = 0.5
    """cnn14, crnn: rate of dropout before the classifier (and before the layer before it) in training."""
    rnn_width: int = 128
    """crnn: units of a recurrent layer in each direction."""

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, architectures in USED_BY.items():
            if self.architecture not in architectures and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} is a setting of {' and '.join(architectures)}, but the architecture is "
                    f"{self.architecture!r}; leave it {defaults[name]!r}"
                )
        _check("num_classes", self.num_classes, 0, 100_000)
        _check("chunk_seconds", self.chunk_seconds, 0.5, 60)
        if self.architecture == "htsat":
            self._check_stages()
        else:
            _check("cnn_width", self.conv_channels[0], 1, 128)
            _check("cnn_dropout", self.conv_dropout, 0, 0.9)
            _check("head_dropout", self.head_dropout, 0, 0.9)
            _check("rnn_width", self.rnn_width, 1, 1024)

    def _check_stages(self) -> None:
        """Check what HTS-AT alone has."""
        _check("embed_dim", self.embed_dim, 8, 1024)
        if not 1 <= len(self.depths) <= 6 or len(self.depths) != len(self.num_heads):
            raise ConfigError(
                f"depths and num_heads must name the same 1 to 6 stages, got {self.depths} and {self.num_heads}"
            )
        for depth in self.depths:
            _check("depths", depth, 1, 64)
        for stage, heads in enumerate(self.num_heads):
            _check("num_heads", heads, 1, 256)
            if (self.embed_dim << stage) % heads:
                raise ConfigError(f"num_heads[{stage}] = {heads} does not divide the width {self.embed_dim << stage}")
        _check("window_size", self.window_size, 2, 32)
        _check("patch_size", self.patch_size, 1, 32)
        if self.stem == "conv" and (self.patch_size.bit_count() != 1 or self.patch_size == 1):
            raise ConfigError(f"the stem 'conv' needs a patch_size of 2, 4, 8, 16 or 32, got {self.patch_size}")
        if self.stem == "conv" and self.embed_dim * 2 < self.patch_size:
            raise ConfigError(f"embed_dim {self.embed_dim} is too narrow for the stem 'conv' of {self.patch_size}")
        _check("image_size", self.image_size, 16, 2048)
        _check("mlp_ratio", self.mlp_ratio, 0.5, 16)
        _check("drop_path", self.drop_path, 0, 0.9)
        _check("fine_frames", self.fine_frames, 0, self.token_frames)
        if self.fine_frames and self.token_frames % self.fine_frames:
            raise ConfigError(
                f"fine_frames {self.fine_frames} does not divide the {self.token_frames} frames of a token"
            )
        _check("fine_width", self.fine_width, 8, 1024)
        # Each number may be in bounds while all together ask for more memory than any machine has.
        per_square = 4 + 2 * self.mlp_ratio
        weights = sum(depth * per_square * (self.embed_dim << stage) ** 2 for stage, depth in enumerate(self.depths))
        _check("weights that embed_dim, depths and mlp_ratio ask for", weights, 0, 2e9)
        if self.image_size % (self.patch_size << (len(self.depths) - 1)):
            raise ConfigError(
                f"image_size {self.image_size} must be a multiple of patch_size x 2^(stages - 1) "
                f"= {self.patch_size << (len(self.depths) - 1)}"
            )
        for stage in range(len(self.depths)):
            resolution = self.image_size // (self.patch_size << stage)
            if resolution > self.window_size and resolution % self.window_size:
                raise ConfigError(
                    f"stage {stage} has {resolution} tokens a side, no multiple of window_size {self.window_size}"
                )

    @property
    def conv_channels(self) -> tuple[int, ...]:
        """Channels of the blocks of convolutions of ``cnn14`` and ``crnn``; ``htsat`` has none."""
        if self.architecture == "htsat":
            return ()
        if self.architecture == "cnn14":
            return tuple((64 if self.cnn_width is None else self.cnn_width) << i for i in range(6))
        return tuple((16 if self.cnn_width is None else self.cnn_width) << min(i, 3) for i in range(7))

    @property
    def conv_dropout(self) -> float:
        """Rate of dropout after each of these blocks."""
        if self.cnn_dropout is not None:
            return self.cnn_dropout
        return 0.2 if self.architecture == "cnn14" else 0.5

    @property
    def token_frames(self) -> int:
        """Frames of the (stretched) log-mel from one token to the next."""
        if self.architecture == "htsat":
            return self.patch_size << (len(self.depths) - 1)
        return 32 if self.architecture == "cnn14" else 4


#: setting of ``ModelConfig`` -> the architectures that it means something to; those not named are for all
USED_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "embed_dim", "depths", "num_heads", "window_size", "patch_size", "stem", "image_size",
            "frequency_embedding", "mlp_ratio", "drop_path", "token_semantic", "clip_pooling", "fine_frames",
            "fine_width",
        ),
        ("htsat",),
    ),
    "decision": ("cnn14",),
    **dict.fromkeys(("cnn_width", "cnn_dropout", "head_dropout"), ("cnn14", "crnn")),
    "rnn_width": ("crnn",),
}  # fmt: skip
#: the fine head: width of its convolutions over time, in steps
FINE_KERNEL = 7
#: and the distances between the steps that each of them looks at: in all 43 steps, 1.7 s of 39 ms each
FINE_DILATIONS = (1, 2, 4)
#: the baselines take a whole number of so many frames, of which ``cnn14`` makes one token
_CNN_FRAMES = 32


@dataclass(frozen=True)
class ClassDecoding:
    """How one class's posteriors become events."""

    threshold: float = 0.5
    """An event needs at least one frame at or above this posterior."""
    threshold_off: float | None = None
    """The event extends while the posterior stays at or above this (hysteresis); None: same as ``threshold``."""
    median_seconds: float = 0.0
    """Length of a median filter over the posteriors before thresholding; 0: none."""
    min_duration: float = 0.0
    """Seconds; shorter events are dropped, after merging."""
    min_gap: float = 0.0
    """Seconds; events of one class with a smaller gap between them are merged."""

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, 0, 1)
        if self.threshold_off is not None:
            _check("threshold_off", self.threshold_off, 0, self.threshold)
        _check("median_seconds", self.median_seconds, 0, 60)
        _check("min_duration", self.min_duration, 0, 600)
        _check("min_gap", self.min_gap, 0, 600)


@dataclass(frozen=True)
class DecodingConfig(ClassDecoding):
    """Decoding settings of all classes, with exceptions per label."""

    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """Label -> the settings that differ for it, e.g. ``{"dog": {"threshold": 0.4}}``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for label in self.per_class:
            self.for_label(label)

    def for_label(self, label: str) -> ClassDecoding:
        """Return the settings that hold for ``label``."""
        names = [f.name for f in dataclasses.fields(ClassDecoding)]
        settings = {name: getattr(self, name) for name in names} | self.per_class.get(label, {})
        return from_dict(ClassDecoding, settings, f"per_class.{label}")

    def changed(self, **settings: float | None) -> Self:
        """Return a copy with these settings for every class, exceptions for them removed."""
        per_class = {
            label: rest
            for label, exceptions in self.per_class.items()
            if (rest := {k: v for k, v in exceptions.items() if k not in settings})
        }
        changes: dict[str, Any] = {**settings, "per_class": per_class}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class LogitCalibration:
    """What makes logits tell probabilities: ``scale * logit + bias`` (Platt scaling) before the sigmoid or softmax."""

    scale: tuple[float, ...] = ()
    """One per class, or a single one for all (the inverse of a temperature); none: 1."""
    bias: tuple[float, ...] = ()
    """One per class, or none: 0."""

    def __post_init__(self) -> None:
        for value in self.scale:
            _check("scale", value, 0.01, 100)
        for value in self.bias:
            _check("bias", value, -100, 100)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return any(value != 1 for value in self.scale) or any(value != 0 for value in self.bias)


@dataclass(frozen=True)
class CalibrationConfig:
    """How the logits of clips and of frames become calibrated before they become posteriors."""

    clipwise: LogitCalibration = field(default_factory=LogitCalibration)
    framewise: LogitCalibration = field(default_factory=LogitCalibration)


@dataclass(frozen=True)
class InferenceConfig:
    """How a recording of any length is given to the model."""

    short: Literal["pad", "tile", "native"] = "pad"
    """Recordings shorter than a chunk: followed by silence (``pad``) or repeated (``tile``) until the chunk is full,
    or heard at the shortest input that holds them (``native``: half a chunk, a quarter ...)."""
    chunk_part: int = 1
    """Recordings are cut into this part of a chunk: 2 for halves, 4 for quarters. For models trained on clips that
    short; one of ``CheckpointConfig.native_sizes``."""
    hop_seconds: float = 5.0
    """Seconds between the starts of overlapping chunks of longer recordings."""
    lookahead_seconds: float | None = None
    """None: where chunks overlap, what they say is cross-faded. A number: as live, chunks roll, and each moment is
    answered for once, by the first chunk that hears at least so many seconds behind it."""
    clip_pooling: Literal["max", "mean", "top"] = "max"
    """Clip posteriors over chunks: largest, mean, or mean of the largest quarter."""
    shifts: int = 1
    """How often each chunk is heard for the framewise output, each time moved by another part of a time step, which
    makes the time steps so much finer. 1: once, at the model's own time steps."""
    classes: Literal["desed", "desed-published"] | None = None
    """Count AudioSet's classes as those of another label set; see ``htsat.labels.class_map``. None: no."""

    def __post_init__(self) -> None:
        _check("chunk_part", self.chunk_part, 1, 1024)
        _check("shifts", self.shifts, 1, 32)
        _check("hop_seconds", self.hop_seconds, 0.1, 60)
        if self.lookahead_seconds is not None:
            _check("lookahead_seconds", self.lookahead_seconds, 0, 60)
            if self.shifts != 1:
                raise ConfigError(
                    f"lookahead_seconds needs shifts = 1 (chunks that roll are not moved), got {self.shifts}"
                )
            if self.short == "native":
                raise ConfigError("lookahead_seconds needs short = 'pad' or 'tile': chunks that roll have one length")


@dataclass(frozen=True)
class CheckpointConfig:
    """Everything beside the weights that a checkpoint needs to rebuild its model and to be used."""

    frontend: FrontendConfig
    model: ModelConfig
    labels: tuple[str, ...] = ()
    """One per class; empty for an encoder without classes."""
    objective: Literal["multi_label", "single_label"] = "multi_label"
    """Clip posteriors are sigmoid (several labels at once) or softmax (exactly one) of the clip logits."""
    framewise: Literal["sigmoid", "softmax"] = "sigmoid"
    """What framewise posteriors are of the token logits. ``sigmoid`` as published, also for models of exactly one
    label, whose logits mean nothing one by one; ``softmax`` for those that we train."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Found by ``htsat calibrate``; without it posteriors are what the network says."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    operating_points: dict[str, DecodingConfig] = field(default_factory=dict)
    """Other decoding settings that can be chosen by name, such as ``high_precision``; see ``decoding_at``."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: source, data, recipe, figures. For people; never interpreted."""

    def __post_init__(self) -> None:
        if len(self.labels) != self.model.num_classes:
            raise ConfigError(
                f"{len(self.labels)} labels for {self.model.num_classes} classes; "
                "give as many labels as the weights have outputs"
            )
        if len(set(self.labels)) != len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise ConfigError(f"label {twice!r} occurs twice")
        points = {f"operating point {name!r}": decoding for name, decoding in self.operating_points.items()}
        for what, decoding in {"decoding": self.decoding, **points}.items():
            for label in decoding.per_class:
                # Labels of another set are known where that set is; see ``htsat.labels.counted_classes``.
                if label not in self.labels and self.inference.classes is None:
                    raise ConfigError(
                        f"{what} names the label {label!r} that the model lacks{nearest(label, self.labels)}"
                    )
        for name in self.operating_points:
            if not name.replace("_", "a").isalnum():
                raise ConfigError(
                    f"expected letters, digits and underscores as the name of an operating point, got {name!r}"
                )
        self._check_calibration()
        frontend, model = self.frontend, self.model
        if model.architecture == "htsat":
            self._check_square()
        elif model.architecture == "cnn14" and frontend.n_mels < 32:
            raise ConfigError(f"cnn14 halves the mel bins five times: n_mels must be 32 or more, got {frontend.n_mels}")
        if self.inference.chunk_part not in self.native_sizes:
            raise ConfigError(
                f"chunk_part {self.inference.chunk_part} is none of the parts of a chunk that the model takes: "
                f"{', '.join(map(str, self.native_sizes))}"
            )
        heard_seconds = model.chunk_seconds / self.inference.chunk_part
        if self.inference.hop_seconds > heard_seconds:
            raise ConfigError(
                f"hop_seconds {self.inference.hop_seconds:g} leaves gaps between chunks of {heard_seconds:g} s"
            )
        if self.lookahead_tokens is not None and self.hop_tokens + self.lookahead_tokens > self.heard_tokens:
            raise ConfigError(
                f"hop_seconds {self.inference.hop_seconds:g} and lookahead_seconds "
                f"{self.inference.lookahead_seconds:g} together exceed a chunk of {heard_seconds:g} s"
            )
        if self.heard_frames > self.heard_samples:
            raise ConfigError(
                f"shifts {self.inference.shifts} gives {self.heard_frames} time steps in {self.heard_samples} samples; "
                f"choose at most {self.heard_samples // self.heard_tokens}"
            )

    def _check_square(self) -> None:
        """Check that the spectrogram of a chunk can be folded to the square of HTS-AT."""
        frontend, model = self.frontend, self.model
        if model.image_size % frontend.n_mels:
            raise ConfigError(f"image_size {model.image_size} must be a multiple of n_mels {frontend.n_mels}")
        token = model.patch_size << (len(model.depths) - 1)
        if frontend.n_mels % token:
            raise ConfigError(
                f"n_mels {frontend.n_mels} must be a multiple of patch_size x 2^(stages - 1) = {token}: "
                "a token of the last stage lies in one stretch of time"
            )
        if self.chunk_samples // frontend.hop_length + 1 > self.num_frames:
            raise ConfigError(
                f"chunk_seconds {model.chunk_seconds:g} gives {self.chunk_samples // frontend.hop_length + 1} frames, "
                f"more than the {self.num_frames} that fit the square"
            )

    def _check_calibration(self) -> None:
        """Refuse calibrations of another number of classes, and those that single labels do not have."""
        for name in ("clipwise", "framewise"):
            calibration: LogitCalibration = getattr(self.calibration, name)
            if len(calibration.scale) not in (0, 1, len(self.labels)) or len(calibration.bias) not in (
                0,
                len(self.labels),
            ):
                raise ConfigError(
                    f"calibration.{name} has {len(calibration.scale)} scales and {len(calibration.bias)} biases for "
                    f"{len(self.labels)} classes; give one for each"
                )

    def decoding_at(self, operating_point: str) -> DecodingConfig:
        """Return the decoding settings of an operating point.

        Raises:
            UsageError: the checkpoint has none of this name.
        """
        known = self.operating_points
        if operating_point in known:
            return known[operating_point]
        have = f"the model has {', '.join(known)}" if known else "the model has none; htsat calibrate finds some"
        raise UsageError(f"unknown operating point {operating_point!r}{nearest(operating_point, known)}; {have}")

    @property
    def chunk_samples(self) -> int:
        """Samples of one chunk at the model's sample rate."""
        return round(self.model.chunk_seconds * self.frontend.sample_rate)

    @property
    def heard_samples(self) -> int:
        """Samples of the chunks that recordings are cut into."""
        return self.chunk_samples // self.inference.chunk_part

    @property
    def heard_tokens(self) -> int:
        """Time steps of the framewise output of such a chunk."""
        return self.num_tokens // self.inference.chunk_part

    @property
    def hop_tokens(self) -> int:
        """Tokens between the starts of chunks."""
        return min(self.heard_tokens, max(1, round(self.inference.hop_seconds / self.token_seconds)))

    @property
    def lookahead_tokens(self) -> int | None:
        """Tokens that chunks hear behind those that they answer for; None: chunks do not roll."""
        seconds = self.inference.lookahead_seconds
        return None if seconds is None else round(seconds / self.token_seconds)

    @property
    def heard_frames(self) -> int:
        """Time steps of the framewise output that shifted hearings of such a chunk make together."""
        return self.heard_tokens * self.inference.shifts

    @property
    def frame_seconds(self) -> float:
        """Seconds of a frame of the framewise output."""
        # From the samples of a chunk, not from its nominal seconds: those may be no whole number of samples.
        return self.heard_samples / (self.heard_frames * self.frontend.sample_rate)

    @property
    def num_frames(self) -> int:
        """Log-mel frames that a chunk is brought to: as many as fill the square; for the baselines a multiple of 32."""
        if self.model.architecture == "htsat":
            return self.model.image_size * (self.model.image_size // self.frontend.n_mels)
        return -(-self.chunk_samples // (_CNN_FRAMES * self.frontend.hop_length)) * _CNN_FRAMES

    @property
    def stretches(self) -> bool:
        """Whether the log-mel of a chunk is stretched to ``num_frames``; else these are its own."""
        return self.num_frames * self.frontend.hop_length != self.chunk_samples

    @property
    def num_tokens(self) -> int:
        """Time steps of the framewise output of one chunk: tokens, or the finer steps of the fine head."""
        return self.num_frames // (self.model.fine_frames or self.model.token_frames)

    @property
    def native_sizes(self) -> tuple[int, ...]:
        """Parts of a chunk that the network also takes, as divisors from 1 on: 2 is half a chunk, 4 a quarter.

        For HTS-AT a shorter clip is a smaller picture: fewer stretches of time above each other, then a narrower one.
        """
        sizes = [1]
        while self._takes(2 * sizes[-1]):
            sizes.append(2 * sizes[-1])
        return tuple(sizes)

    def _takes(self, divisor: int) -> bool:
        """Return whether every stage can be cut into windows, and merged, at this part of a chunk."""
        model = self.model
        frames = self.num_frames // divisor
        if model.architecture != "htsat":
            return self.num_frames % (divisor * _CNN_FRAMES) == 0 and frames // model.token_frames >= 2
        if self.num_frames % divisor or (frames > model.image_size and frames % model.image_size):
            return False
        rows = max(1, frames // model.image_size) * self.frontend.n_mels
        columns = min(frames, model.image_size)
        for stage in range(len(model.depths)):
            step = model.patch_size << stage
            window = min(model.window_size, model.image_size // step)
            for cells in (rows, columns):
                side = cells // step
                if cells % step or side % min(window, side):
                    return False
        return columns // step >= 2

    def native_size(self, num_samples: int) -> int:
        """Return the divisor of the shortest native input that holds ``num_samples``."""
        return max(size for size in self.native_sizes if size == 1 or self.chunk_samples // size >= num_samples)

    def native_samples(self, num_samples: int) -> int:
        """Return the length of the shortest native input that holds ``num_samples``."""
        return self.chunk_samples // self.native_size(num_samples)

    def native_frames(self, num_samples: int) -> int:
        """Return how many frames the stages take for the shortest native input that holds ``num_samples``."""
        return self.num_frames // self.native_size(num_samples)

    @property
    def token_seconds(self) -> float:
        """Seconds between time steps of the framewise output."""
        return self.model.chunk_seconds / self.num_tokens
