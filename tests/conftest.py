"""Shared fixtures: where the real CTs lie, if they are there."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the processes share the cores; set before PyTorch reads it
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import hypothesis
import torch

hypothesis.settings.register_profile("same examples in every run", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples in every run")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that import onnxruntime themselves


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of real CTs named by FSEFT_EDGE_DATA; the test is skipped, saying so, when it is unset."""
    root = os.environ.get("FSEFT_EDGE_DATA")
    if not root:
        pytest.skip("FSEFT_EDGE_DATA is unset: no real CT to test on")
    return Path(root)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let SIGINT interrupt, also where the tests run in the background of a shell, which ignores it there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Undo what a command line did to logging and signals that was run in the test's own process."""
    logger = logging.getLogger("fseft_edge")
    level, handlers = logger.level, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    logger.setLevel(level)
    logging.captureWarnings(capture=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_remembered_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the user's own benchmarks remembered out of the tests, and the tests out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "no_cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no NVIDIA GPU"))
