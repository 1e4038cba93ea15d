"""Gradients of convolutions whose kernel is longer than their input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from doubles import poisoned
from torch import nn

from fseft_edge.adaptation.bfloat16_fix import short_inputs_in_float32


def gradients_with_filled_memory(mode: str) -> list[float]:
    """Return the gradients of :mod:`doubles.poisoned` in a process that fills freed memory with large numbers."""
    finished = subprocess.run(  # noqa: S603 - a program of these tests
        [sys.executable, poisoned.__file__, mode],
        env={**os.environ, "MALLOC_PERTURB_": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(value) for value in finished.stdout.split()]


def test_gradients_do_not_contain_uninitialised_memory() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = poisoned.gradients(precision=torch.float32, guarded=False)
    torch.set_num_threads(threads)
    assert gradients_with_filled_memory("guarded") == pytest.approx(expected, rel=0.02)


def test_autocast_applies_if_the_input_is_long_enough() -> None:
    short, long = nn.Conv3d(2, 2, 5, padding=2), nn.Conv3d(2, 2, 3, padding=1)
    x = torch.rand(1, 2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), short_inputs_in_float32(nn.Sequential(short, long)):
        assert short(x.bfloat16()).dtype == torch.float32
        assert long(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert short(x).dtype == torch.bfloat16
