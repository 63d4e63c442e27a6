"""From a configuration to its network."""

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.base import SoundModel
from htsat.model.cnn14 import CNN14
from htsat.model.crnn import CRNN
from htsat.model.htsat import HTSAT

_NETWORKS: dict[str, type[HTSAT | CNN14 | CRNN]] = {"htsat": HTSAT, "cnn14": CNN14, "crnn": CRNN}


def build_model(frontend: FrontendConfig, model: ModelConfig) -> SoundModel:
    """Return the network that ``model.architecture`` names, with its first weights."""
    return _NETWORKS[model.architecture](frontend, model)
