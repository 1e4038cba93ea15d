"""The arithmetic of a GPU is the same for all threads of the process, as long as one of them computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from doubles.encoder import write_tiny_encoder
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32

EXACT = (False, True, False, "highest")


def arithmetic() -> tuple[bool, bool, bool, str]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def before() -> Iterator[tuple[bool, bool, bool, str]]:
    """Let the program around this project compute with TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        torch.set_float32_matmul_precision("high")
        yield arithmetic()
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.encoder")


class OnGpu(EncoderSession):
    """A session whose device is a GPU that does not compute."""

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        return [windows]


def test_the_settings_are_restored_when_the_last_context_ends(before: tuple[bool, bool, bool, str]) -> None:
    assert before == (True, False, True, "high")
    first, second = ExitStack(), ExitStack()
    first.enter_context(exact_float32())
    second.enter_context(exact_float32())
    first.close()
    assert arithmetic() == EXACT
    with ThreadPoolExecutor(1) as other:
        other.submit(second.close).result()
    assert arithmetic() == before


def test_no_thread_sees_other_settings_while_it_computes(before: tuple[bool, bool, bool, str]) -> None:
    """Two threads open and close contexts at the same time, in all orders that the scheduler makes."""
    together = threading.Barrier(2)

    def compute(_: int) -> set[tuple[bool, bool, bool, str]]:
        together.wait()
        seen = set()
        for _ in range(300):
            with exact_float32():
                seen |= {arithmetic() for _ in range(3)}
        return seen

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(compute, range(2))) == [{EXACT}, {EXACT}]
    assert arithmetic() == before


def test_a_session_on_a_gpu_keeps_the_arithmetic_until_it_is_closed(
    bundle: EncoderBundle, before: tuple[bool, bool, bool, str]
) -> None:
    """A second encoder is opened before the first one is closed."""
    sessions = [OnGpu(bundle, torch.device("cuda", 0), 1) for _ in range(2)]
    for session in sessions:
        session.keep_arithmetic()
    assert arithmetic() == EXACT
    sessions[0].close()
    sessions[0].close()
    assert arithmetic() == EXACT
    sessions[1].close()
    assert arithmetic() == before


def test_a_session_on_a_processor_changes_no_setting_of_the_process(
    bundle: EncoderBundle, before: tuple[bool, bool, bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*_: object, **__: object) -> None:
        raise AssertionError("a setting of the process was changed")

    with open_session(bundle, device="cpu", backend="torch") as session:
        monkeypatch.setattr(torch.backends.cudnn, "flags", changed)
        monkeypatch.setattr(torch, "set_num_threads", changed)
        session.encode(torch.zeros(1, 1, *bundle.window))
        assert arithmetic() == before


def test_nothing_but_this_module_changes_the_settings() -> None:
    root = Path(__file__).parents[3]
    users = {
        path.name
        for folder in ("runtime", "export", "fseft_edge")
        for path in (root / folder).rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in ("cudnn.flags", "allow_tf32", "fp32_precision"))
    }
    assert users == {"gpu_arithmetic.py"}
