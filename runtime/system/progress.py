"""How far long work has come: a bar on a terminal, plain lines elsewhere, nothing when quiet.

Library functions take ``progress: Progress | None = None``, use :class:`SilentProgress` for None, and report so::

    with progress.task("encode hn_002", total=12) as task:
        for window in windows:
            ...
            task.advance()

The command line makes the display once, with :func:`open_progress`. Everything is written to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

_LEAST_SECONDS = 5.0
_LEAST_SHARE = 0.1
_SILENCE_SECONDS = 30.0
"""A plain line is due after 5 s once another 10 % is done, and after 30 s whenever anything is done."""


class ProgressTask(Protocol):
    """One piece of work under way. A context manager: leaving it ends the task, complete or not."""

    def advance(self, n: float = 1) -> None:
        """Report that ``n`` more of the task's total are done."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """Where progress goes."""

    def task(self, name: str, total: float) -> ProgressTask:
        """Begin a piece of work.

        Args:
            name: what is done, to whom: "encode hn_002".
            total: how much there is to do, in any unit; :meth:`ProgressTask.advance` counts in the same.
        """


class ProgressDisplay(Progress, Protocol):
    """A progress that holds the terminal while it is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_progress(*, quiet: bool = False, stream: TextIO | None = None) -> ProgressDisplay:
    """The display that fits the stream: silent when quiet, bars on a terminal, plain lines in a file or pipe.

    Args:
        quiet: show nothing.
        stream: where to write; stderr when None.
    """
    if quiet:
        return SilentProgress()
    stream = sys.stderr if stream is None else stream
    return BarProgress(stream) if stream.isatty() else PlainProgress(stream)


class _Scope:
    """A context manager that ends by calling :meth:`_finish`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(failed=kind is not None)

    def _finish(self, *, failed: bool) -> None:
        """Nothing by default."""


class _SilentTask(_Scope):
    def advance(self, n: float = 1) -> None:
        """Nothing."""


class SilentProgress(_Scope):
    """Shows nothing."""

    def task(self, name: str, total: float) -> ProgressTask:  # noqa: ARG002  the protocol's names
        """A task that shows nothing."""
        return _SilentTask()


class PlainProgress(_Scope):
    """Whole lines, few of them, for log files and pipes.

    Args:
        stream: where the lines go.
        clock: seconds, from any start.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    def task(self, name: str, total: float) -> ProgressTask:
        """A task that writes a line now and then, and one when it ends."""
        return _PlainTask(name, total, self._stream, self._clock)


class _PlainTask(_Scope):
    def __init__(self, name: str, total: float, stream: TextIO, clock: Callable[[], float]) -> None:
        self._name = name
        self._total = total
        self._stream = stream
        self._clock = clock
        self._done = 0.0
        self._start = self._line_time = clock()
        self._line_done = 0.0

    def advance(self, n: float = 1) -> None:
        self._done += n
        now = self._clock()
        silence = now - self._line_time
        advanced = (self._done - self._line_done) / max(self._total, 1e-9)
        enough = silence >= _LEAST_SECONDS and advanced >= _LEAST_SHARE
        if self._done < self._total and (enough or silence >= _SILENCE_SECONDS):
            self._line(f"{100 * self._done / self._total:.0f} %", now)

    def _finish(self, *, failed: bool) -> None:
        self._line("stopped" if failed else "done", self._clock())

    def _line(self, state: str, now: float) -> None:
        self._stream.write(f"{self._name}: {state} ({now - self._start:.1f} s)\n")
        self._stream.flush()
        self._line_time, self._line_done = now, self._done


class BarProgress(_Scope):
    """A live bar per task, with the time left, on a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415  not needed where nothing is shown
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415 - likewise
        from rich.progress import Progress as RichBars  # noqa: PLC0415 - likewise

        self._bars = RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def task(self, name: str, total: float) -> ProgressTask:
        """A task with a bar of its own."""
        return _BarTask(self._bars, self._bars.add_task(name, total=total))

    def _finish(self, *, failed: bool) -> None:  # noqa: ARG002  each bar has said it already
        self._bars.stop()


class _BarTask(_Scope):
    def __init__(self, bars: RichBars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, n: float = 1) -> None:
        self._bars.advance(self._task, n)

    def _finish(self, *, failed: bool) -> None:
        """Fill the bar of work that ended early and well; leave that of work which broke off where it stood."""
        if not failed:
            total = self._bars.tasks[self._bars.task_ids.index(self._task)].total
            self._bars.update(self._task, completed=total)
        self._bars.stop_task(self._task)
