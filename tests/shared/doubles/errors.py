"""What every test of a refusal checks: the kind of error, what it names, and that a remedy is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from fseft_edge.runtime.errors import FseftEdgeError

Kind = TypeVar("Kind", bound=FseftEdgeError)


@contextmanager
def refused(kind: type[Kind], *named: object) -> Iterator[pytest.ExceptionInfo[Kind]]:
    """Expect an error of exactly this kind whose message contains each of ``named``, and which has a remedy."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.type is kind
    for name in named:
        assert str(name) in caught.value.message
    assert caught.value.remedy.strip()
