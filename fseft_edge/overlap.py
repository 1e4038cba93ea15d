"""Cases one after another, their stages side by side: one is read ahead, one worked on, one finished.

Encoding keeps the engine busy; reading, the adapters and writing keep other parts of the machine busy. At any time at
most one case is in each stage, so memory is bounded whatever the number of cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NoReturn, TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Worked = TypeVar("Worked")
Finished = TypeVar("Finished")


def overlapped(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Prepared], Worked],
    finish: Callable[[Worked], Finished],
) -> Iterator[Future[Finished]]:
    """Yield every item's outcome, in order: a future that is done, with the result or with what a stage raised.

    Work is done in the calling thread, where an interrupt reaches it; preparing and finishing in a thread each. When
    the caller stops early, what these two are at is still completed.

    Args:
        items: what goes through the stages.
        prepare: first stage.
        work: the long one.
        finish: last stage.
    """
    finishing: Future[Finished] | None = None
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        upcoming = [ahead.submit(prepare, item) for item in items[:1]]
        for number in range(len(items)):
            current = upcoming.pop()
            wait([current])
            upcoming = [ahead.submit(prepare, item) for item in items[number + 1 : number + 2]]
            last: Callable[[], Finished]
            try:
                last = partial(finish, work(current.result()))
            except Exception as error:  # the item's own trouble, which its outcome tells
                last = partial(_raise, error)
            if finishing is not None:
                wait([finishing])
            before, finishing = finishing, behind.submit(last)
            del last
            if before is not None:
                yield before
        if finishing is not None:
            wait([finishing])
            yield finishing


def _raise(error: Exception) -> NoReturn:
    raise error
