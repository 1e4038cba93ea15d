"""Progress display for long work: a bar on a terminal, plain lines in files and pipes, no output with ``--quiet``.

Library functions take ``progress: Progress | None = None`` and use :class:`SilentProgress` for None. Example::

    with progress.task("encode hn_002", total=12) as task:
        for window in windows:
            ...
            task.advance()

The command line creates one display with :func:`open_progress`. All output goes to stderr.
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

_MIN_SECONDS = 5.0
_MIN_SHARE = 0.1
_MAX_SILENT_SECONDS = 30.0
"""A plain line is printed after 5 s if at least another 10 % is complete, and after 30 s if there is any progress."""


class ProgressTask(Protocol):
    """One task in progress. It is a context manager; leaving the context ends the task, complete or not."""

    def advance(self, n: float = 1) -> None:
        """Report that ``n`` more units of the total of this task are complete."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """Receiver of progress reports."""

    def task(self, name: str, total: float) -> ProgressTask:
        """Start a task.

        Args:
            name: name of the work and of its object, such as "encode hn_002".
            total: amount of work in any unit; :meth:`ProgressTask.advance` uses this unit.
        """


class ProgressDisplay(Progress, Protocol):
    """Progress display that controls the terminal while its context is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_progress(*, quiet: bool = False, stream: TextIO | None = None) -> ProgressDisplay:
    """Return the display for a stream: silent if ``quiet``, bars on a terminal, plain lines in a file or pipe.

    Args:
        quiet: return a display without output.
        stream: output stream; None means stderr.
    """
    if quiet:
        return SilentProgress()
    stream = sys.stderr if stream is None else stream
    return BarProgress(stream) if stream.isatty() else PlainProgress(stream)


class _Scope:
    """Context manager that calls :meth:`_finish` at its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(failed=kind is not None)

    def _finish(self, *, failed: bool) -> None:
        """Do nothing by default."""


class _SilentTask(_Scope):
    def advance(self, n: float = 1) -> None:
        """Do nothing."""


class SilentProgress(_Scope):
    """Progress display without output."""

    def task(self, name: str, total: float) -> ProgressTask:  # noqa: ARG002 - the protocol defines these names
        """Return a task without output."""
        return _SilentTask()


class PlainProgress(_Scope):
    """Progress display that prints few complete lines, for log files and pipes.

    Args:
        stream: output stream.
        clock: function that returns a time in seconds from an arbitrary start.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    def task(self, name: str, total: float) -> ProgressTask:
        """Return a task that prints occasional lines and a final line."""
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
        enough = silence >= _MIN_SECONDS and advanced >= _MIN_SHARE
        if self._done < self._total and (enough or silence >= _MAX_SILENT_SECONDS):
            self._line(f"{100 * self._done / self._total:.0f} %", now)

    def _finish(self, *, failed: bool) -> None:
        self._line("stopped" if failed else "done", self._clock())

    def _line(self, state: str, now: float) -> None:
        self._stream.write(f"{self._name}: {state} ({now - self._start:.1f} s)\n")
        self._stream.flush()
        self._line_time, self._line_done = now, self._done


class BarProgress(_Scope):
    """Progress display with one bar for each task and the remaining time, on a terminal.

    Args:
        stream: terminal to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 - only needed for bars
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415 - bars only
        from rich.progress import Progress as RichBars  # noqa: PLC0415 - only needed for bars

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
        """Return a task with a separate bar."""
        return _BarTask(self._bars, self._bars.add_task(name, total=total))

    def _finish(self, *, failed: bool) -> None:  # noqa: ARG002 - each bar shows whether its task failed
        self._bars.stop()


class _BarTask(_Scope):
    def __init__(self, bars: RichBars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, n: float = 1) -> None:
        self._bars.advance(self._task, n)

    def _finish(self, *, failed: bool) -> None:
        """Fill the bar if the work succeeded before its total was reached; leave the bar unchanged after a failure."""
        if not failed:
            total = self._bars.tasks[self._bars.task_ids.index(self._task)].total
            self._bars.update(self._task, completed=total)
        self._bars.stop_task(self._task)
