"""Pipeline of three stages: order of results, isolation of failures, and real overlap of the stages."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fseft_edge.runtime.system.overlap import overlapped

TIMEOUT = 30.0  # seconds that a stage waits for another stage


def test_results_are_those_of_the_stages_in_order() -> None:
    outcomes = overlapped(range(5), lambda item: item + 1, lambda item: item * 10, str)
    assert [outcome.result() for outcome in outcomes] == ["10", "20", "30", "40", "50"]
    assert list(overlapped([], int, int, int)) == []


def test_waiting_for_the_next_item_does_not_delay_the_current_item() -> None:
    """The second item only becomes available after the first item is finished."""
    finished = threading.Event()

    def next_items() -> Iterator[int]:
        yield 0
        assert finished.wait(TIMEOUT)
        yield 1

    def finish(item: int) -> int:
        finished.set()
        return item

    assert [outcome.result() for outcome in overlapped(next_items(), int, int, finish)] == [0, 1]


@pytest.mark.parametrize("stage", ["prepare", "work", "finish"])
def test_a_failing_item_does_not_affect_other_items(stage: str) -> None:
    def stage_function(name: str, item: int) -> int:
        if name == stage and item == 1:
            raise ValueError(f"{name} {item}")
        return item

    outcomes = list(
        overlapped(
            range(3), *(lambda item, name=name: stage_function(name, item) for name in ("prepare", "work", "finish"))
        )
    )
    assert [outcome.exception() is None for outcome in outcomes] == [True, False, True]
    with pytest.raises(ValueError, match=f"{stage} 1"):
        outcomes[1].result()


def test_the_next_item_is_prepared_and_the_previous_finished_during_work() -> None:
    """Work on the second item waits until the first is in its last stage and the third is prepared."""
    prepared, finishing, worked = (threading.Event() for _ in range(3))

    def prepare(item: int) -> int:
        if item == 2:
            prepared.set()
        return item

    def work(item: int) -> int:
        if item == 1:
            assert prepared.wait(TIMEOUT)
            assert finishing.wait(TIMEOUT)
            worked.set()
        return item

    def finish(item: int) -> int:
        if item == 0:
            finishing.set()
            assert worked.wait(TIMEOUT)
        return item

    assert [outcome.result() for outcome in overlapped(range(3), prepare, work, finish)] == [0, 1, 2]


def test_at_most_one_item_is_in_each_stage() -> None:
    inside = {"prepare": 0, "finish": 0}
    most = dict(inside)
    ahead: list[int] = []
    done: list[int] = []

    def counted(name: str, item: int) -> int:
        inside[name] += 1
        most[name] = max(most[name], inside[name])
        inside[name] -= 1
        return item

    def work(item: int) -> int:
        ahead.append(item - len(done))
        return item

    for outcome in overlapped(
        range(20), lambda item: counted("prepare", item), work, lambda item: counted("finish", item)
    ):
        done.append(outcome.result())
    assert most == {"prepare": 1, "finish": 1}
    assert max(ahead) <= 2
    assert done == list(range(20))


def test_an_interrupt_during_work_stops_the_pipeline() -> None:
    finished: list[int] = []

    def work(item: int) -> int:
        if item == 1:
            raise KeyboardInterrupt
        return item

    with pytest.raises(KeyboardInterrupt):
        list(overlapped(range(5), int, work, finished.append))
    assert finished == [0]
