"""What can be measured by name, and what each needs to run here."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from htsat.apps.bench.measure import has_bfloat16
from htsat.backends import REMEDIES, BackendName, Precision, has_package
from htsat.errors import UsageError, nearest

#: backend and precision of ours
OWN: dict[str, tuple[BackendName, Precision]] = {
    "torch": ("torch", "float32"),
    "torch-bf16": ("torch", "bfloat16"),
    "compiled": ("compiled", "float32"),
    "compiled-bf16": ("compiled", "bfloat16"),
    "onnxruntime": ("onnxruntime", "float32"),
    "openvino": ("openvino", "float32"),
    "openvino-bf16": ("openvino", "bfloat16"),
}
BASELINES = ("clap", "cnn14", "ast")
#: of the bundled model
BUNDLED = "default"
NAMES = ("plain", *OWN, *BASELINES, BUNDLED)
#: those that are measured if none are named: compiling takes a minute, and the bundled model is another network
USUAL = ("plain", "torch", "torch-bf16", "onnxruntime", "openvino", "openvino-bf16", *BASELINES)
#: the same where a model is named
USUAL_OF_MODEL = tuple(name for name in USUAL if name not in BASELINES)


@dataclass(frozen=True)
class Candidate:
    """Something that runs a network.

    Attributes:
        name: as tables show it.
        kind: one of ``NAMES``, but ``BUNDLED``.
        subject: name of the network whose weights it has; a baseline's own name.
    """

    name: str
    kind: str
    subject: str

    @property
    def is_exported(self) -> bool:
        """Return whether it runs an exported file."""
        return self.kind in OWN and OWN[self.kind][0] in ("onnxruntime", "openvino")

    @property
    def is_float32(self) -> bool:
        """Return whether it computes in float32 throughout."""
        return self.kind not in OWN or OWN[self.kind][1] == "float32"


def split(values: Iterable[str]) -> list[str]:
    """Return the words of options that may be repeated and may be lists: a,b and c are a, b and c."""
    words = (word.strip() for value in values for word in value.split(","))
    return list(dict.fromkeys(word for word in words if word))


def choose(names: Sequence[str], subject: str) -> list[Candidate]:
    """Return the candidates of some names, each once, in the order of ``NAMES``.

    Args:
        names: of ``NAMES``.
        subject: whose weights ours and the plain one have.

    Raises:
        UsageError: a name is unknown.
    """
    check(names, NAMES, "candidate")
    found = []
    for name in NAMES:
        if name not in names:
            continue
        if name in BASELINES:
            found.append(Candidate(name, name, name))
        elif name != BUNDLED:
            found.append(Candidate(name, name, subject))
        else:
            kinds = ("torch", "onnxruntime", "openvino")
            if subject != BUNDLED:
                found += [Candidate(f"{BUNDLED}/{kind}", kind, BUNDLED) for kind in kinds]
            else:
                found += [Candidate(kind, kind, BUNDLED) for kind in kinds if kind not in names]
    return found


def check(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse unknown names.

    Raises:
        UsageError: naming the first that is unknown, and the nearest known one.
    """
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; expected {', '.join(known)}{nearest(name, known)}")


def lacking(candidate: Candidate, has_checkpoint: bool, has_export: bool) -> str | None:
    """Return why a candidate cannot be measured here, and what helps; None if it can.

    Args:
        candidate: what is to be measured.
        has_checkpoint: whether there is a PyTorch network of its weights.
        has_export: whether they are exported already.
    """
    kind = candidate.kind
    if kind in OWN or kind == "plain":
        if candidate.is_exported:
            packages = [OWN[kind][0], *(() if has_export else ("torch", "safetensors", "onnx", "onnxscript"))]
        elif has_checkpoint:
            packages = ["torch", "safetensors"]
        else:
            return "the model is exported, which PyTorch does not run; give its checkpoint"
    else:
        packages = ["torch", *(("transformers",) if kind in ("ast", "clap") else ())]
    for package in packages:
        if not has_package(package):
            return f"{package} is not installed: pip install {REMEDIES[package]}"
    if not candidate.is_float32 and not has_bfloat16():
        return "this processor has no instructions for bfloat16"
    if kind.startswith("compiled") and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        return "torch.compile needs a C++ compiler, and there is none; install g++ or set CXX"
    return None
