"""The confidence of organs, summed over pieces of a scan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fseft_edge.masks.decision import ConfidenceTally


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), organs=st.integers(1, 5), pieces=st.integers(1, 4))
def test_the_confidence_of_a_scan_in_pieces_equals_that_of_the_complete_scan(
    seed: int, organs: int, pieces: int
) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, organs + 1, (12, 5, 4)).astype(np.uint8)
    probabilities = random.random((12, 5, 4), np.float32)
    tally = ConfidenceTally(organs)
    for part in np.array_split(np.arange(12), pieces):
        tally.add(labels[part], probabilities[part])
    for label, mean in enumerate(tally.means(), start=1):
        mask = labels == label
        assert mean == (pytest.approx(probabilities[mask].mean(), rel=1e-5) if mask.any() else None)


def test_labels_of_two_bytes_are_counted() -> None:
    tally = ConfidenceTally(300)
    tally.add(np.full((2, 2, 2), 300, np.uint16), np.full((2, 2, 2), 0.5, np.float32))
    assert tally.means()[298:] == (None, 0.5)
