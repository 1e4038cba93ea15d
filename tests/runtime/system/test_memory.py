"""Memory budgets, free memory, and detection of out-of-memory errors."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st

from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.system.memory import (
    GB,
    Budget,
    Footprint,
    first_that_fits,
    free_ram,
    free_vram,
    is_out_of_memory,
    resident_bytes,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """A plan that consists only of a footprint."""

    footprint: Footprint


PLANS = st.lists(
    st.builds(Plan, st.builds(Footprint, st.integers(1, 10**12), st.integers(0, 10**12))), min_size=1, max_size=8
)
AMOUNTS = st.integers(1, 10**12)


@given(plans=PLANS, ram=AMOUNTS, vram=AMOUNTS)
def test_a_plan_is_within_the_budget_or_the_error_states_a_sufficient_budget(
    plans: list[Plan], ram: int, vram: int
) -> None:
    fitting = [plan for plan in plans if plan.footprint.ram <= ram and plan.footprint.vram <= vram]
    if fitting:
        assert first_that_fits(plans, Budget(ram, vram), CPU, "painting") is fitting[0]
        return
    with refused(OutOfMemoryError, "painting") as caught:
        first_that_fits(plans, Budget(ram, vram), CPU, "painting")
    assert caught.value.exit_code == 4
    _, option, gigabytes, *_ = caught.value.remedy.split()
    enough = round(float(gigabytes) * 100) * (GB // 100)
    if option == "--memory":
        assert first_that_fits(plans, Budget(enough, vram), CPU, "painting").footprint.ram <= enough
    else:  # the memory of the machine can be too small too
        assert first_that_fits(plans, Budget(10**12, enough), CPU, "painting").footprint.vram <= enough


@given(plans=PLANS, ram=AMOUNTS, vram=AMOUNTS, more=AMOUNTS, more_vram=AMOUNTS)
def test_a_larger_budget_never_gives_a_later_plan(
    plans: list[Plan], ram: int, vram: int, more: int, more_vram: int
) -> None:
    try:
        plan = first_that_fits(plans, Budget(ram, vram), CPU, "painting")
    except OutOfMemoryError:
        return
    larger = first_that_fits(plans, Budget(ram + more, vram + more_vram), CPU, "painting")
    assert plans.index(larger) <= plans.index(plan)


def test_without_a_budget_the_smallest_plan_is_used_with_a_warning_if_none_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plans = [Plan(Footprint(10**16)), Plan(Footprint(10**15))]
    assert first_that_fits(plans, Budget(), CPU, "painting") is plans[1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Painting" in record.getMessage()
    assert "1000000.0 GB" in record.getMessage()


def test_budgets_are_in_units_of_a_billion_bytes(caplog: pytest.LogCaptureFixture) -> None:
    assert Budget.of(3, 0.5) == Budget(3_000_000_000, 500_000_000)
    assert Budget.of(None, None) == Budget()
    with caplog.at_level(logging.WARNING):
        assert first_that_fits([Plan(Footprint(GB))], Budget.of(1, None), CPU, "painting").footprint.ram == GB
    assert caplog.text == ""


@pytest.mark.parametrize("amount", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_budget_is_refused(amount: float) -> None:
    with refused(UsageError, "memory", amount):
        Budget.of(amount, None)
    with refused(UsageError, "vram", amount):
        Budget.of(None, amount)


def test_resident_memory_grows_with_written_pages() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size) as fresh:  # memory from an allocator may already be resident
        before = resident_bytes()
        fresh.write(b"x" * size)
        assert 0.9 * size < resident_bytes() - before < 2.5 * size


def test_free_memory_includes_resident_memory_and_is_at_most_that_of_the_machine() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a plain read, independent of the code
        total = int(file.readline().split()[1]) << 10
    assert 0.9 * resident_bytes() <= free_ram() <= 0.9 * total + resident_bytes()
    assert free_vram(CPU) == 0


def test_real_errors_of_allocators_are_detected() -> None:
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("no"), KeyError("memory"), OSError(28, "No space left")]
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
