"""What a run starts from: random weights, a model of ours, published weights, or ImageNet's; and its teacher."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from htsat.errors import CheckpointError, ConfigError, nearest
from htsat.model.architectures import build_model
from htsat.model.base import SoundModel
from htsat.model.convert import convert, imagenet_start
from htsat.model.hub import resolve
from htsat.model.runtime import load_model
from htsat.training.optim import is_head
from htsat.training.recipe import Recipe

#: weights that those of a model without a fine head lack; it starts with giving the tokens' own logits
FINE_HEAD = ("fine.",)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def make_model(recipe: Recipe, on_note: Callable[[str], None]) -> SoundModel:
    """Return the model of a run before its first step.

    Raises:
        CheckpointError, DownloadError: the weights to start from cannot be had or are of another architecture.
        ConfigError: ``start.freeze`` names no weights.
    """
    model = build_model(recipe.frontend, recipe.model)
    if recipe.train.prior:
        model.set_prior(recipe.train.prior)
    if recipe.start.model:
        on_note(load_start(model, recipe.start.model, recipe.data.labels))
    set_frozen(model, recipe.start.freeze)
    return model


def load_start(model: SoundModel, source: str, labels: tuple[str, ...]) -> str:
    """Load the weights of ``source`` into a model that is about to be trained.

    Rows of the classifier are taken over for classes of the same name; other classes start anew.

    Returns:
        A line that says what was taken over.

    Raises:
        CheckpointError: not weights of this architecture; nothing is loaded in part but the classifier.
    """
    path = Path(source)
    if path.suffix in _PICKLES and path.is_file():
        if path.name.startswith("swin_"):
            report = imagenet_start(model, path)
            return f"started from {source}: {len(report.loaded)} tensors, {len(report.missing)} start anew"
        other, config, _ = convert(path)
        own_labels = config.labels
    else:
        other = load_model(resolve(source))
        own_labels = other.labels if other.config.num_classes else ()
    theirs, mine = other.state_dict(), model.state_dict()
    anew = FINE_HEAD if not any(name.startswith(FINE_HEAD) for name in theirs) else ()
    for name, tensor in mine.items():
        if is_head(name) or name.startswith(anew):
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = "lacks it" if name not in theirs else f"has {list(theirs[name].shape)}"
            raise CheckpointError(
                f"{source}: is of another architecture than the recipe: tensor {name} must be {list(tensor.shape)}, "
                f"the file {found}; set [model] and [frontend] as `htsat info {source}` says"
            )
    taken = [label for label in labels if label in own_labels]
    with torch.no_grad():
        for name, tensor in mine.items():
            if name.startswith(anew):
                continue
            if not is_head(name):
                tensor.copy_(theirs[name])
            elif name in theirs and theirs[name].shape[1:] == tensor.shape[1:]:
                for label in taken:
                    tensor[labels.index(label)] = theirs[name][own_labels.index(label)]
    differs = "" if other.frontend_config == model.frontend_config else "; its front end has other settings"
    if anew and any(name.startswith(anew) for name in mine):
        differs += "; the fine head starts anew"
    if not differs and len(taken) == len(labels):
        return f"started from {source}"
    return f"started from {source}: {len(taken)} of {len(labels)} classes taken over{differs}"


def set_frozen(model: SoundModel, beginnings: tuple[str, ...]) -> None:
    """Let all weights learn but those whose names begin with one of ``beginnings``.

    Raises:
        ConfigError: no weight begins like that.
    """
    names = [name for name, _ in model.named_parameters()]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise ConfigError(f"start.freeze: no weights begin with {beginning!r}{nearest(beginning, names)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(beginnings) if beginnings else True)


class Teacher(nn.Module):
    """A model whose clip logits the student learns from; it hears the student's waveforms.

    Args:
        model: any model with the student's classes, and its sample rate.
        labels: the student's classes.

    Raises:
        ConfigError: another sample rate, or classes it lacks.
    """

    def __init__(self, model: SoundModel, labels: tuple[str, ...], sample_rate: int) -> None:
        super().__init__()
        if model.frontend_config.sample_rate != sample_rate:
            raise ConfigError(
                f"distill.teacher hears {model.frontend_config.sample_rate} Hz, the student {sample_rate} Hz; "
                "set frontend.sample_rate to the teacher's, or use distill.logits"
            )
        if lacking := [label for label in labels if label not in model.labels]:
            raise ConfigError(
                f"distill.teacher lacks {len(lacking)} of the {len(labels)} classes: {', '.join(lacking[:5])}"
                f"{nearest(lacking[0], model.labels)}"
            )
        self.model = model.eval().requires_grad_(False)
        self._columns = [model.labels.index(label) for label in labels]
        # As it is used: at native size if its checkpoint says so.
        self._fit = model.checkpoint.inference.short

    def forward(self, waveforms: Tensor) -> Tensor:
        """Return clip logits (batch, num_classes) of waveforms (batch, num_samples)."""
        with torch.inference_mode():
            logits = self.model(waveforms, self._fit).clipwise_logits
        assert logits is not None
        chosen: Tensor = logits[:, self._columns].clone()
        return chosen


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher | None:
    """Return the teacher of a run on ``device``, or None.

    Raises:
        CheckpointError, DownloadError, ConfigError: it cannot be had or does not fit.
    """
    if not recipe.distill.teacher:
        return None
    model = load_model(recipe.distill.teacher)
    return Teacher(model, recipe.data.labels, recipe.frontend.sample_rate).to(device)
