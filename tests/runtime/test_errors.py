"""Errors between processes."""

from __future__ import annotations

import pickle

import pytest

from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, SomeCasesFailedError, UsageError


@pytest.mark.parametrize(
    "error",
    [
        UsageError("It does not fit.", remedy="Choose another."),
        OutOfMemoryError("Memory ran out.", remedy="Close something.", least=7),
        SomeCasesFailedError("1 of 2 failed.", remedy="Look at it.", completed=(1, 2)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_whole_in_another_process(error: FseftEdgeError) -> None:
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - this test's own
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))
