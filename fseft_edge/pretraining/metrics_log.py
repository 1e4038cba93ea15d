"""What is written down of every training step: ``metrics.csv``, and events for TensorBoard where they are asked for."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fseft_edge.runtime.errors import MissingBackendError
from fseft_edge.runtime.system.atomic import atomic_path

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, over the crops of all processes; a row of ``metrics.csv``.

    Attributes:
        step: how many steps were done with it, from 1.
        loss: the sum of its three parts.
        segmentation: the partial-label loss on level 0.
        deep_supervision: that on the coarser levels, weighted.
        inpainting: the L1 loss of restoring erased boxes, weighted.
        learning_rate: of AdamW.
        seconds: that the step took, its crops included.
    """

    step: int
    loss: float
    segmentation: float
    deep_supervision: float
    inpainting: float
    learning_rate: float
    seconds: float


class MetricsLog:
    """The metrics of a run, on disk whenever they are saved.

    Args:
        folder: of the run; holds ``metrics.csv`` and, for TensorBoard, ``tensorboard/``.
        done: steps of an earlier run that goes on; what it wrote down beyond them is dropped.
        tensorboard: whether to write events, too.

    Raises:
        MissingBackendError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, done: int, tensorboard: bool) -> None:
        self._path = folder / "metrics.csv"
        self._events = _event_writer(folder / "tensorboard", done) if tensorboard else None
        earlier = self._path.read_text(encoding="utf-8").splitlines() if done and self._path.exists() else []
        self._rows = [row for row in earlier if (number := re.match(r"\d+(?=,)", row)) and int(number[0]) <= done]

    def add(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step."""
        values = asdict(metrics)
        row = io.StringIO()
        csv.writer(row, lineterminator="").writerow(values.values())
        self._rows.append(row.getvalue())
        if self._events is not None:
            for name, value in values.items():
                if name != "step":
                    self._events.add_scalar(name, value, metrics.step)

    def save(self) -> None:
        """Write everything that was taken so far.

        Raises:
            OutOfSpaceError: there is no room.
        """
        header = ",".join(field.name for field in fields(StepMetrics))
        with atomic_path(self._path) as temporary:
            temporary.write_text("\n".join([header, *self._rows, ""]), encoding="utf-8")
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """End the events' file."""
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, done: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingBackendError(
            "TensorBoard is not installed.",
            remedy="Install it with `pip install 'fseft-edge[tensorboard]'`, or leave --tensorboard out.",
        ) from error
    return SummaryWriter(str(folder), purge_step=done + 1)
