"""The number of threads follows the cores that this process may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.system import threads
from fseft_edge.runtime.system.threads import limit_threads


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
