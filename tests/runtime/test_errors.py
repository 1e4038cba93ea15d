"""Errors keep their kind and attributes when a process sends them to another process."""

from __future__ import annotations

import pickle

import pytest

from fseft_edge.runtime import errors
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, SomeCasesFailedError, UsageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FseftEdgeError)]


def pickled(error: FseftEdgeError) -> FseftEdgeError:
    copy: FseftEdgeError = pickle.loads(pickle.dumps(error))  # noqa: S301 - the data come from this test
    return copy


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_of_any_kind_survives_pickling(kind: type[FseftEdgeError]) -> None:
    error = kind("It does not fit.", remedy="Choose another.")
    assert type(pickled(error)) is kind
    assert str(pickled(error)) == str(error) == "It does not fit. Choose another."


@pytest.mark.parametrize(
    "error",
    [
        UsageError("It does not fit.", remedy="Choose another."),
        OutOfMemoryError("Memory ran out.", remedy="Close something.", least=7),
        SomeCasesFailedError("1 of 2 failed.", remedy="Look at it.", completed=(1, 2)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_all_attributes_when_pickled(error: FseftEdgeError) -> None:
    assert (pickled(error).args, vars(pickled(error))) == (error.args, vars(error))
