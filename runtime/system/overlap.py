"""Pipeline of three stages: while one item is in the main stage, the next is prepared and the previous is finished.

Encoding uses the inference engine; reading, the adapters and writing use other parts of the machine. At most one item
is in each stage at any time, so the memory does not grow with the number of items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NoReturn, TypeVar, cast

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Worked = TypeVar("Worked")
Finished = TypeVar("Finished")


def overlapped(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Prepared], Worked],
    finish: Callable[[Worked], Finished],
) -> Iterator[Future[Finished]]:
    """Run each item through three stages and yield, in order, a completed future with the result or the exception.

    ``work`` runs in the calling thread, so that an interrupt reaches it. ``prepare`` and ``finish`` each run in their
    own thread. If the caller stops early, the current calls of ``prepare`` and ``finish`` still run to their end.

    Args:
        items: items to process. The iterator is advanced one item ahead, in the thread of ``prepare``, and may block.
        prepare: first stage.
        work: second stage, which takes most of the time.
        finish: last stage.

    Yields:
        For each item a completed future: the result of ``finish``, or the exception of the stage that failed.
    """
    remaining = iter(items)
    previous: Future[Finished] | None = None  # the item in the last stage

    def prepare_next() -> Prepared | _End:
        for item in remaining:
            return prepare(item)
        return _End()

    with ThreadPoolExecutor(1) as prepare_thread, ThreadPoolExecutor(1) as finish_thread:
        next_prepared = prepare_thread.submit(prepare_next)
        while True:
            prepared = next_prepared
            wait([prepared])
            if prepared.exception() is None and isinstance(prepared.result(), _End):
                break
            next_prepared = prepare_thread.submit(prepare_next)
            finish_call: Callable[[], Finished]
            try:
                finish_call = partial(finish, work(cast("Prepared", prepared.result())))
            except Exception as error:  # the future of this item reports the exception
                finish_call = partial(_raise, error)
            del prepared  # frees the prepared item
            if previous is not None:
                wait([previous])
            finished, previous = previous, finish_thread.submit(finish_call)
            del finish_call  # frees the item as soon as it is finished
            if finished is not None:
                yield finished
        if previous is not None:
            wait([previous])
            yield previous


class _End:
    """Marker for the end of the items."""


def _raise(error: Exception) -> NoReturn:
    raise error
