"""The number of threads follows the cores that this process may use, and work side by side is all done."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.system import threads
from fseft_edge.runtime.system.threads import limit_threads, side_by_side


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "processes", "expected"), [(3, 1, 3), (16, 1, 6), (12, 3, 4), (2, 4, 1), (1, 1, 1)])
def test_threads_are_at_most_the_share_of_the_cores_and_never_more_than_before(
    cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    torch.set_num_threads(6)
    limit_threads(processes)
    assert torch.get_num_threads() == expected
    limit_threads(processes)
    assert torch.get_num_threads() == expected


def test_every_computation_has_the_limit_because_it_asks_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    torch.set_num_threads(5)
    resolve_device("cpu")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("cores", "most"), [(4, 2), (2, 4)])
def test_at_most_so_many_items_are_worked_on_at_a_time(cores: int, most: int) -> None:
    torch.set_num_threads(cores)
    together = threading.Barrier(2)  # is passed only by two items at a time
    done: list[int] = []

    def work(item: int) -> None:
        together.wait(timeout=30)
        done.append(item)

    names_before = {thread.name for thread in threading.enumerate()}
    side_by_side(work, range(6), most)
    assert sorted(done) == list(range(6))
    assert {thread.name for thread in threading.enumerate()} <= names_before


def test_with_one_core_items_are_worked_on_in_their_order() -> None:
    torch.set_num_threads(1)
    done: list[int] = []
    side_by_side(done.append, range(5), 2)
    assert done == list(range(5))


def test_the_first_error_is_raised_and_work_that_has_not_begun_is_left_out() -> None:
    torch.set_num_threads(1)
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise OSError(f"item {item}")

    with pytest.raises(OSError, match="item 1"):
        side_by_side(work, range(200), 1)
    assert begun == [0, 1]
