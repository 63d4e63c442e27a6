"""Several training processes, as ``torchrun`` starts them. The engine is PyTorch's own.

Without ``torchrun`` everything here is a no-op for one process.
"""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from htsat.errors import UsageError

T = TypeVar("T")
#: what PyTorch's engines say when another process is gone, in lower case
_LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out",
         "remote process exited", "socket closed", "socket error")  # fmt: skip


class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
        local: number of this process on its machine.
    """

    def __init__(self) -> None:
        """Join the other processes, if ``torchrun`` started this one.

        Raises:
            UsageError: the environment names processes in a way that cannot be.
        """
        try:
            self.rank = int(os.environ.get("RANK", "0"))
            self.world = int(os.environ.get("WORLD_SIZE", "1"))
            self.local = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK are not whole numbers ({error}); use torchrun") from None
        if self.world > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local % torch.cuda.device_count())  # what is gathered goes through it
            # Minutes, not the default half hour: when one process dies, the others must not wait for it for long.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=10)
            )
            # The processes stay together for all runs of this one (folds, seeds), to its end. Left any earlier, what is
            # left of DDP after an error would be the last to hold the group: it then waits for the group's thread,
            # which waits for Python, which waits for it (PyTorch 2.13).
            atexit.register(dist.destroy_process_group)
            if "TORCHELASTIC_RUN_ID" in os.environ:
                end_with_parent(signal.SIGTERM)  # a killed torchrun leaves its processes behind; they save and end

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network with gradients averaged over the processes."""
        if self.world == 1:
            return network
        # DDP deals gradients out to other buckets after the first step, unless it looks for unused parameters. Where
        # a gradient lies decides in which order three or more processes add it up: a resumed run would differ.
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=self.world > 2,
        )

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over the processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, problem: Exception | None) -> None:
        """Raise the problem that any process has, in all of them, so that none waits for one that has ended.

        Raises:
            Exception: the problem of the process with the lowest rank.
        """
        problems = [p for p in self.gather(problem) if p is not None]
        if problems:
            raise problems[0]

    def from_first(self, value: T) -> T:
        """Return the first process's value."""
        if self.world == 1:
            return value
        values: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(values, 0)
        found: T = values[0]
        return found

    def lost(self, error: Exception) -> bool:
        """Say whether an error means that another process is gone."""
        text = str(error).lower()
        return self.world > 1 and (isinstance(error, dist.DistError) or any(words in text for words in _LOST))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def end_with_parent(number: int) -> None:
    """Let the system send this process a signal when the one that started it ends, however that happens (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
