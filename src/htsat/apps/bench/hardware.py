"""What the processor can do at best: how fast it multiplies matrices, which no network can beat."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from htsat.apps.bench.measure import take_turns
from htsat.backends import Precision

if TYPE_CHECKING:
    from torch import Tensor

#: rows, inputs and outputs of the products: two squares, and the widest layers of the published network's four stages
SHAPES = {
    "square 1024": (1024, 1024, 1024),
    "square 2048": (2048, 2048, 2048),
    "stage 1": (4096, 96, 384),
    "stage 2": (1024, 192, 768),
    "stage 3": (256, 384, 1536),
    "stage 4": (64, 768, 3072),
}
ROUNDS = 5


@dataclass(frozen=True)
class ShapeRate:
    """How fast one product is, in operations a second.

    Attributes:
        shape: of ``SHAPES``.
        median: of all calls of the faster of the ways to compute it.
        best: of all calls.
    """

    shape: str
    median: float
    best: float


@dataclass(frozen=True)
class MatrixRate:
    """How fast matrices are multiplied, in operations a second: a product counts as one and its addition as another.

    Attributes:
        precision: of the numbers.
        best: of all products and calls: the limit.
        shapes: each product.
    """

    precision: Precision
    best: float
    shapes: tuple[ShapeRate, ...]


def measure_rates(threads: int, precisions: Sequence[Precision], rounds: int = ROUNDS) -> list[MatrixRate]:
    """Return how fast PyTorch multiplies matrices here, by the faster of the two libraries that it has for that.

    Args:
        threads: of the CPU.
        precisions: of the numbers.
        rounds: calls that are timed of each product.
    """
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        return [_rate(precision, rounds) for precision in precisions]


def _rate(precision: Precision, rounds: int) -> MatrixRate:
    import torch
    from torch import nn

    from htsat.model.swin import linear

    def product(x: "Tensor", layer: nn.Linear) -> "Tensor":
        return x @ layer.weight.t()

    calls: dict[str, Callable[[], float]] = {}
    operations = {}
    for shape, (rows, inputs, outputs) in SHAPES.items():
        kind = torch.float32 if precision == "float32" else torch.bfloat16
        x, layer = torch.randn(rows, inputs).to(kind), nn.Linear(inputs, outputs).to(kind)
        for way, function in (("product", partial(product, x, layer)), ("layer", partial(linear, layer, x))):
            calls[f"{shape}/{way}"] = partial(_seconds, function)
            operations[f"{shape}/{way}"] = 2 * rows * inputs * outputs
    found = take_turns(calls, dict.fromkeys(calls, 1 + rounds), rest=0.0)
    rates = {name: [operations[name] / seconds for seconds in times[1:]] for name, times in found.items()}
    shapes = []
    for shape in SHAPES:
        ways = [rates[f"{shape}/{way}"] for way in ("product", "layer")]
        shapes.append(ShapeRate(shape, max(map(statistics.median, ways)), max(map(max, ways))))
    return MatrixRate(precision, max(rate.best for rate in shapes), tuple(shapes))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def faster(first: Sequence[MatrixRate], second: Sequence[MatrixRate]) -> list[MatrixRate]:
    """Return the better of two measurements of each precision: another program may have been in the way of one."""
    return [max(pair, key=lambda rate: rate.best) for pair in zip(first, second, strict=True)]
