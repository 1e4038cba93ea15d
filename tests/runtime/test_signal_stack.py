"""Signals still reach Python after libraries were at work."""

from __future__ import annotations

import ctypes
from pathlib import Path

from doubles.models import WINDOW, small_network, windows

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.backends.openvino import CompiledGraph
from fseft_edge.runtime.signal_stack import SignalStack, own_signal_stack, signal_stack


def fields(stack: SignalStack) -> tuple[object, ...]:
    return stack.pointer, stack.flags, stack.size


def test_the_stack_is_given_back() -> None:
    before = fields(signal_stack())
    memory = ctypes.create_string_buffer(1 << 16)
    with own_signal_stack():
        other = SignalStack(ctypes.addressof(memory), 0, len(memory))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None) == 0
        assert fields(signal_stack())[0] == ctypes.addressof(memory)
    assert fields(signal_stack()) == before


def test_openvino_leaves_the_stack_as_it_was(tmp_path: Path) -> None:
    """Its own was gone with it, and the next Ctrl-C a segmentation fault."""
    before = fields(signal_stack())
    write_graph(small_network(), WINDOW, tmp_path / "graph.onnx")
    run = CompiledGraph(tmp_path / "graph.onnx", 1, "float32")
    run(windows(1))
    assert fields(signal_stack()) == before
    del run
    assert fields(signal_stack()) == before
