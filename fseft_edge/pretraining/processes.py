"""Training by several processes, each on its own GPU, that share the crops of every step (started by ``torchrun``)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from fseft_edge.adaptation.losses import single_process
from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together.

    Attributes:
        device: where it computes.
        rank: its number, from 0.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def own(self) -> slice:
        """Which of a step's crops are this process's."""
        return slice(self.rank, None, self.count)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes.

        Its gradient is summed likewise: each process takes the loss of the whole batch for its own, and the mean of
        their gradients, which :class:`DistributedDataParallel` forms, is then the gradient of that loss.
        """
        if self.count == 1:
            return single_process(tensor)
        summed: Tensor = _Total.apply(tensor)  # type: ignore[no-untyped-call]  # torch does not type it
        return summed

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def check_agreement(self, step: int, output: Path) -> None:
        """Make sure that all processes begin at the same step.

        Raises:
            UsageError: they do not, since they see different files.
        """
        if float(self.total(torch.tensor(float(step), device=self.device))) != step * self.count:
            raise UsageError(
                f"The processes do not see the same checkpoint in {output}.",
                remedy="Choose an --output on a disk that all machines share.",
            )

    def shared(self, network: nn.Module) -> nn.Module:
        """Return the network as a module whose backward pass brings the gradients of all processes together."""
        return network if self.count == 1 else DistributedDataParallel(network)

    def share_statistics(self, network: nn.Module) -> None:
        """Let the batch normalisations of a network normalise over the crops of all processes, in place."""
        if self.count == 1:
            return
        for name, norm in list(network.named_modules()):
            if isinstance(norm, nn.BatchNorm3d):
                network.set_submodule(name, _SharedBatchNorm(norm, self))


@contextlib.contextmanager
def open_processes(device: str) -> Iterator[Processes]:
    """Give this process its place among those that ``torchrun`` started; alone where it started none.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; with several processes, each takes the GPU of its own number.

    Raises:
        UsageError: the device is unknown.
        EnvironmentProblemError: there is no GPU, and ``cpu`` was not said; this machine has fewer than processes;
            another process has ended.
    """
    place = resolve_device(device)
    if not distributed.is_torchelastic_launched():
        yield Processes(place)
        return
    # torchrun tells a process its place by environment variables.
    here, number = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if place.type == "cpu" and device == "auto":
        raise EnvironmentProblemError(
            f"torchrun started {here} processes, each for a GPU of its own, and no NVIDIA GPU can be used here.",
            remedy="Say --device cpu to let them share this machine's processor; `fseft-edge doctor` shows its GPUs.",
        )
    if place.type == "cuda":
        present = torch.cuda.device_count()
        if here > present:
            raise EnvironmentProblemError(
                f"torchrun started {here} processes on this machine, which has {present} NVIDIA GPUs.",
                remedy=f"Start it with --nproc-per-node {present}, or use --device cpu.",
            )
        place = torch.device("cuda", number)
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        with warnings.catch_warnings():
            # Of kernels of one voxel, whose strides mean nothing: where channels come last they differ all the same.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield Processes(place, distributed.get_rank(), distributed.get_world_size())
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise EnvironmentProblemError(
                "Another process of this run has ended, or cannot be reached.", remedy="Its own message says why."
            ) from error
        raise
    finally:
        distributed.destroy_process_group()


class _Total(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        summed = tensor.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # noqa: ARG004 - likewise
        summed = gradient.clone()
        distributed.all_reduce(summed)
        return summed


class _SharedBatchNorm(nn.BatchNorm3d):
    """Batch normalisation over the crops of all processes, on a CPU too, where torch's SyncBatchNorm does not go.

    Args:
        norm: whose parameters and statistics it goes on with.
        processes: that share a batch.
    """

    def __init__(self, norm: nn.BatchNorm3d, processes: Processes) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())
        self._processes = processes

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return ``input`` ``[n, C, X, Y, Z]`` normalised, by the running statistics where they are held."""
        if not self.training:
            return super().forward(input)
        axes, x = (0, 2, 3, 4), input.to(torch.promote_types(input.dtype, torch.float32))
        own_voxels = x.new_tensor([x.numel() / x.shape[1]])
        sums = self._processes.total(torch.cat([x.sum(axes), own_voxels]))
        voxels = sums[-1].detach()
        mean = sums[:-1] / voxels
        deviation = x - _per_channel(mean)
        variance = self._processes.total(deviation.square().sum(axes)) / voxels
        self._follow(mean.detach(), variance.detach() * voxels / (voxels - 1))
        scaled = deviation * _per_channel(self.weight * torch.rsqrt(variance + self.eps))
        return (scaled + _per_channel(self.bias)).to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch's own batch normalisation does."""
        assert self.running_mean is not None and self.running_var is not None  # noqa: S101, PT018 - narrows the types
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]
