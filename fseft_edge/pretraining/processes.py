"""Training with several processes, started by ``torchrun``: one GPU per process; they share the crops of a step."""

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
    """The device and the rank of this process among the processes that train together.

    Attributes:
        device: device of this process.
        rank: number of this process, from 0.
        count: number of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True for the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def own(self) -> slice:
        """Slice of a step's crops that this process computes."""
        return slice(self.rank, None, self.count)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes.

        The gradient is also summed over all processes. Each process computes the loss of the whole batch, so the mean
        of the gradients, which :class:`DistributedDataParallel` computes, is the gradient of that loss.
        """
        if self.count == 1:
            return single_process(tensor)
        summed: Tensor = _Total.apply(tensor)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return summed

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.count > 1:
            distributed.barrier()

    def check_agreement(self, step: int, output: Path) -> None:
        """Raise UsageError unless all processes start at the same step.

        Args:
            step: step at which this process starts.
            output: folder of the run, for the message.

        Raises:
            UsageError: the processes start at different steps, because they read different files.
        """
        if float(self.total(torch.tensor(float(step), device=self.device))) != step * self.count:
            raise UsageError(
                f"The processes find different checkpoints in {output}.",
                remedy="Set --output to a folder on a disk that all machines share.",
            )

    def shared(self, network: nn.Module) -> nn.Module:
        """Return the network as a module whose backward pass averages the gradients over all processes."""
        return network if self.count == 1 else DistributedDataParallel(network)

    def share_statistics(self, network: nn.Module) -> None:
        """Replace every batch normalisation, in place, by a normalisation over the crops of all processes."""
        if self.count == 1:
            return
        for name, norm in list(network.named_modules()):
            if isinstance(norm, nn.BatchNorm3d):
                network.set_submodule(name, _SharedBatchNorm(norm, self))


@contextlib.contextmanager
def open_processes(device: str = "auto") -> Iterator[Processes]:
    """Yield the device and rank of this process among the processes that ``torchrun`` started.

    Without ``torchrun``, the process trains as a single process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``. With several processes, each process uses the GPU of its local rank.

    Raises:
        UsageError: the device is unknown.
        EnvironmentProblemError: no GPU can be used and ``device`` is not ``cpu``; this machine has fewer GPUs than
            processes; or another process has ended.
    """
    place = resolve_device(device)
    if not distributed.is_torchelastic_launched():
        yield Processes(place)
        return
    # torchrun sets these environment variables for each process.
    here, number = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if place.type == "cpu" and device == "auto":
        raise EnvironmentProblemError(
            f"torchrun started {here} processes, which need one NVIDIA GPU each, but no NVIDIA GPU can be used here.",
            remedy="Add --device cpu to train on the processor, or run `fseft-edge doctor` to see why no GPU is found.",
        )
    if place.type == "cuda":
        present = torch.cuda.device_count()
        if here > present:
            raise EnvironmentProblemError(
                f"torchrun started {here} processes on this machine, but the machine has {present} NVIDIA GPUs.",
                remedy=f"Start torchrun with --nproc-per-node {present}, or add --device cpu.",
            )
        place = torch.device("cuda", number)
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        with warnings.catch_warnings():
            # Harmless: the warning is about 1x1x1 kernels, whose strides have no meaning. In the channels-last memory
            # format, these strides differ.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield Processes(place, distributed.get_rank(), distributed.get_world_size())
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise EnvironmentProblemError(
                "Another process of this run has ended or cannot be reached.",
                remedy="Read the message of that process above or in its log, correct its problem and start again.",
            ) from error
        raise
    finally:
        distributed.destroy_process_group()


class _Total(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:  # noqa: ARG004 - the signature is torch's
        summed = tensor.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # noqa: ARG004 - the signature is torch's
        summed = gradient.clone()
        distributed.all_reduce(summed)
        return summed


class _SharedBatchNorm(nn.BatchNorm3d):
    """Batch normalisation over the crops of all processes; unlike torch's SyncBatchNorm, it also works on a CPU.

    Args:
        norm: the batch normalisation whose parameters and statistics are copied.
        processes: the processes that share a batch.
    """

    def __init__(self, norm: nn.BatchNorm3d, processes: Processes) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())
        self._processes = processes

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is torch's
        """Return ``input`` ``[n, C, X, Y, Z]`` normalised; in evaluation mode, by the running statistics."""
        if not self.training:
            return super().forward(input)
        axes, x = (0, 2, 3, 4), input.to(torch.promote_types(input.dtype, torch.float32))
        own_voxels = x.new_tensor([x.numel() / x.shape[1]])
        sums = self._processes.total(torch.cat([x.sum(axes), own_voxels]))
        voxels = sums[-1].detach()
        mean = sums[:-1] / voxels
        deviation = x - _per_channel(mean)
        variance = self._processes.total(deviation.square().sum(axes)) / voxels
        self._update_running_statistics(mean.detach(), variance.detach() * voxels / (voxels - 1))
        scaled = deviation * _per_channel(self.weight * torch.rsqrt(variance + self.eps))
        return (scaled + _per_channel(self.bias)).to(input.dtype)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics with those of a batch, as torch's batch normalisation does."""
        assert self.running_mean is not None and self.running_var is not None  # noqa: S101, PT018 - narrows the types for mypy
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]
