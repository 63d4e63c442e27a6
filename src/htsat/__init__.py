"""htsat: sound classification and sound event detection with HTS-AT.

    import htsat

    predictor = htsat.Predictor("default")
    prediction = predictor.predict("street.ogg")
    prediction.tags      # what sounds in the recording, most probable first
    prediction.events    # what sounds when

Names are loaded when they are first used: ``import htsat`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htsat.client import Client, ServerError
    from htsat.config import CheckpointConfig, DecodingConfig, FrontendConfig, InferenceConfig, ModelConfig
    from htsat.errors import (
        AudioError,
        CheckpointError,
        ConfigError,
        DataError,
        DownloadError,
        HtsatError,
        OutputError,
        UsageError,
    )
    from htsat.events import Event, Tag
    from htsat.grid import FrameGrid
    from htsat.labels import label_set
    from htsat.model.htsat import HTSAT, ModelOutput
    from htsat.model.runtime import load_model
    from htsat.predict import Prediction, Predictor

__version__ = "0.1.0"

_HOMES = {
    "htsat.client": ("Client", "ServerError"),
    "htsat.config": ("CheckpointConfig", "DecodingConfig", "FrontendConfig", "InferenceConfig", "ModelConfig"),
    "htsat.errors": (
        "AudioError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DownloadError",
        "HtsatError",
        "OutputError",
        "UsageError",
    ),
    "htsat.events": ("Event", "Tag"),
    "htsat.grid": ("FrameGrid",),
    "htsat.labels": ("label_set",),
    "htsat.model.htsat": ("HTSAT", "ModelOutput"),
    "htsat.model.runtime": ("load_model",),
    "htsat.predict": ("Prediction", "Predictor"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "HTSAT",
    "AudioError",
    "CheckpointConfig",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DataError",
    "DecodingConfig",
    "DownloadError",
    "Event",
    "FrameGrid",
    "FrontendConfig",
    "HtsatError",
    "InferenceConfig",
    "ModelConfig",
    "ModelOutput",
    "OutputError",
    "Prediction",
    "Predictor",
    "ServerError",
    "Tag",
    "UsageError",
    "__version__",
    "label_set",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'htsat' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
