"""Cases one after another, their stages side by side: one is read ahead, one worked on, one finished.

Encoding keeps the engine busy; reading, the adapters and writing keep other parts of the machine busy. At any time at
most one case is in each stage, so memory is bounded whatever the number of cases.
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
    """Yield every item's outcome, in order: a future that is done, with the result or with what a stage raised.

    Work is done in the calling thread, where an interrupt reaches it; preparing and finishing in a thread each. When
    the caller stops early, what these two are at is still completed.

    Args:
        items: what goes through the stages; asked for one ahead, in the thread that prepares, so it may wait for more.
        prepare: first stage.
        work: the long one.
        finish: last stage.
    """
    coming = iter(items)
    finishing: Future[Finished] | None = None

    def prepared() -> Prepared | _End:
        for item in coming:
            return prepare(item)
        return _End()

    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        upcoming = [ahead.submit(prepared)]
        while True:
            current = upcoming.pop()
            wait([current])
            if current.exception() is None and isinstance(current.result(), _End):
                break
            upcoming = [ahead.submit(prepared)]
            last: Callable[[], Finished]
            try:
                last = partial(finish, work(cast("Prepared", current.result())))
            except Exception as error:  # the item's own trouble, which its outcome tells
                last = partial(_raise, error)
            del current
            if finishing is not None:
                wait([finishing])
            before, finishing = finishing, behind.submit(last)
            del last
            if before is not None:
                yield before
        if finishing is not None:
            wait([finishing])
            yield finishing


class _End:
    """There are no more items."""


def _raise(error: Exception) -> NoReturn:
    raise error
