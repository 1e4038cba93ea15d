"""The list of known architectures: each one can be built, and its memory can be predicted."""

from __future__ import annotations

import pytest
from doubles.errors import refused
from doubles.inserts import SETTINGS

from fseft_edge.runtime.encoder.networks import ARCHITECTURES, IMPORTED, build_network
from fseft_edge.runtime.encoder.networks.peak_memory import activation_bytes
from fseft_edge.runtime.errors import EncoderBundleError


def test_known_architectures_are_those_of_the_test_networks_and_imported() -> None:
    assert set(ARCHITECTURES) == {*SETTINGS, IMPORTED}


@pytest.mark.parametrize("architecture", SETTINGS)
def test_a_known_architecture_is_built_and_its_memory_is_predicted(architecture: str) -> None:
    network = build_network(architecture, **SETTINGS[architecture])
    pyramid = 4 * sum(level.channels * (64 // level.stride) ** 3 for level in network.levels)
    assert activation_bytes(architecture, SETTINGS[architecture], (64, 64, 64), slabwise=False) > pyramid


@pytest.mark.parametrize("architecture", [IMPORTED, "net_of_2030"])
def test_an_imported_or_unknown_architecture_is_not_built(architecture: str) -> None:
    with refused(EncoderBundleError):
        build_network(architecture)
