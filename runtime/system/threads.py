"""The number of threads that PyTorch and the inference engines use."""

from __future__ import annotations

import torch

from fseft_edge.runtime.system.limits import usable_cores


def limit_threads(processes: int = 1) -> None:
    """Let PyTorch use no more threads than this process has cores; engines use as many threads as PyTorch.

    PyTorch itself takes the cores of the machine, or the number in ``OMP_NUM_THREADS``, and does not see the quota of a
    container. The number of threads belongs to the whole process. It only ever becomes smaller, so a second call
    changes nothing, also while other threads compute.

    Args:
        processes: number of processes of this run on this machine, which share the cores in equal parts.
    """
    allowed = max(1, usable_cores() // processes)
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)
