"""The log of every training step: ``metrics.csv`` and, on request, events for TensorBoard."""

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
    """The metrics of one training step over the crops of all processes; a row of ``metrics.csv``.

    Attributes:
        step: number of the step, from 1.
        loss: the total loss, the sum of the next three values.
        segmentation: partial-label loss on level 0.
        deep_supervision: partial-label loss on the coarser levels, weighted.
        inpainting: L1 loss of restoring erased boxes, weighted.
        learning_rate: learning rate of AdamW.
        seconds: duration of the step in seconds, including making the crops.
    """

    step: int
    loss: float
    segmentation: float
    deep_supervision: float
    inpainting: float
    learning_rate: float
    seconds: float


class MetricsLog:
    """The metrics of a run; :meth:`save` writes them to the disk.

    Args:
        folder: folder of the run, which receives ``metrics.csv`` and, for TensorBoard, ``tensorboard/``.
        done: number of steps in the checkpoint of a run that is resumed; rows of later steps are deleted.
        tensorboard: True also writes events for TensorBoard.

    Raises:
        MissingBackendError: ``tensorboard`` is True and TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, done: int, tensorboard: bool) -> None:
        self._path = folder / "metrics.csv"
        self._events = _event_writer(folder / "tensorboard", done) if tensorboard else None
        earlier = self._path.read_text(encoding="utf-8").splitlines() if done and self._path.exists() else []
        self._rows = [row for row in earlier if (number := re.match(r"\d+(?=,)", row)) and int(number[0]) <= done]

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of a step."""
        values = asdict(metrics)
        row = io.StringIO()
        csv.writer(row, lineterminator="").writerow(values.values())
        self._rows.append(row.getvalue())
        if self._events is not None:
            for name, value in values.items():
                if name != "step":
                    self._events.add_scalar(name, value, metrics.step)

    def save(self) -> None:
        """Write all metrics that were added so far.

        Raises:
            OutOfSpaceError: there is not enough free disk space.
        """
        header = ",".join(field.name for field in fields(StepMetrics))
        with atomic_path(self._path) as temporary:
            temporary.write_text("\n".join([header, *self._rows, ""]), encoding="utf-8")
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the file of events."""
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, done: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - TensorBoard is an optional dependency
    except ImportError as error:
        raise MissingBackendError(
            "--tensorboard needs TensorBoard, which is not installed.",
            remedy="Install TensorBoard with `pip install 'fseft-edge[tensorboard]'`, or remove --tensorboard.",
        ) from error
    return SummaryWriter(str(folder), purge_step=done + 1)
