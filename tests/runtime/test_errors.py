"""Errors between processes."""

from __future__ import annotations

import pickle

import pytest

from fseft_edge.runtime import errors
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, SomeCasesFailedError, UsageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FseftEdgeError)]


def arrived(error: FseftEdgeError) -> FseftEdgeError:
    again: FseftEdgeError = pickle.loads(pickle.dumps(error))  # noqa: S301 - this test's own
    return again


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_of_any_kind_arrives_in_another_process(kind: type[FseftEdgeError]) -> None:
    error = kind("It does not fit.", remedy="Choose another.")
    assert type(arrived(error)) is kind
    assert str(arrived(error)) == str(error) == "It does not fit. Choose another."


@pytest.mark.parametrize(
    "error",
    [
        UsageError("It does not fit.", remedy="Choose another."),
        OutOfMemoryError("Memory ran out.", remedy="Close something.", least=7),
        SomeCasesFailedError("1 of 2 failed.", remedy="Look at it.", completed=(1, 2)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_whole(error: FseftEdgeError) -> None:
    assert (arrived(error).args, vars(arrived(error))) == (error.args, vars(error))
