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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Task

_MIN_SECONDS = 5.0
_MIN_SHARE = 0.1
_MAX_SILENT_SECONDS = 30.0
"""A plain line is printed after 5 s if at least another 10 % is complete, and after 30 s if there is any progress."""


class ProgressTask(Protocol):
    """One task in progress."""

    def advance(self, n: float = 1) -> None:
        """Report that ``n`` more units of the total of this task are complete."""


class Progress(Protocol):
    """Receiver of progress reports."""

    def task(self, name: str, total: float) -> AbstractContextManager[ProgressTask]:
        """Start a task; leaving the context ends the task, complete or not.

        Args:
            name: name of the work and of its object, such as "encode hn_002".
            total: amount of work in any unit; :meth:`ProgressTask.advance` uses this unit.
        """


class SilentProgress:
    """Progress without output."""

    def task(self, name: str, total: float) -> AbstractContextManager[ProgressTask]:  # noqa: ARG002 - as in the protocol
        """Return a task without output."""
        return nullcontext(self)

    def advance(self, n: float = 1) -> None:
        """Do nothing."""


class RichProgress:
    """Progress on a stream: one bar for each task with the remaining time on a terminal, else few complete lines.

    Args:
        stream: output stream.
        clock: function that returns a time in seconds from an arbitrary start.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console  # noqa: PLC0415 - slow to import, and not needed with --quiet
        from rich.progress import (  # noqa: PLC0415 - slow to import, and not needed with --quiet
            BarColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichDisplay  # noqa: PLC0415 - slow to import, not needed with --quiet

        console = Console(file=stream)
        self._stream = stream
        self.bars = console.is_terminal
        self.display = RichDisplay(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.bars,
            get_time=clock,
        )

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[ProgressTask]:
        """Show a task. Work that succeeds before its total was reached is shown as complete."""
        key = self.display.add_task(name, total=total)
        shown = self.display.tasks[self.display.task_ids.index(key)]
        task = _RichTask(self, shown)
        try:
            yield task
        except BaseException:
            task.write("stopped")
            raise
        else:
            self.display.update(key, completed=total)
            task.write("done")
        finally:
            self.display.stop_task(key)

    def write(self, line: str) -> None:
        """Write a plain line where there are no bars."""
        if not self.bars:
            self._stream.write(f"{line}\n")
            self._stream.flush()


class _RichTask:
    def __init__(self, progress: RichProgress, shown: Task) -> None:
        self._progress = progress
        self._shown = shown
        self._line_seconds, self._line_percentage = 0.0, 0.0

    def advance(self, n: float = 1) -> None:
        self._progress.display.advance(self._shown.id, n)
        silence = self._seconds - self._line_seconds
        advanced = self._shown.percentage - self._line_percentage
        enough = silence >= _MIN_SECONDS and advanced >= 100 * _MIN_SHARE
        if not self._shown.finished and (enough or silence >= _MAX_SILENT_SECONDS):
            self.write(f"{self._shown.percentage:.0f} %")

    def write(self, state: str) -> None:
        self._line_seconds, self._line_percentage = self._seconds, self._shown.percentage
        self._progress.write(f"{self._shown.description}: {state} ({self._line_seconds:.1f} s)")

    @property
    def _seconds(self) -> float:
        return self._shown.elapsed or 0.0


@contextmanager
def open_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Progress]:
    """Open the display for a stream: silent if ``quiet``, bars on a terminal, plain lines in a file or pipe.

    Args:
        quiet: open a display without output.
        stream: output stream; None means stderr.
    """
    if quiet:
        yield SilentProgress()
        return
    progress = RichProgress(sys.stderr if stream is None else stream)
    with progress.display:
        yield progress
