"""Remember the speeds of backends that `fseft-edge benchmark` measured on this machine; ``auto`` uses these speeds.

The speeds are in one small file of the user, ``$XDG_CACHE_HOME/fseft-edge/speeds.json`` (``~/.cache`` if the variable
is not set). The file contains names of processors and GPUs, versions, encoder ids and seconds, but no data of scans. A
record is valid only for the same encoder, the same device and the same installed versions. The file may be deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fseft_edge.runtime.errors import EnvironmentProblemError
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.libraries import installed_versions
from fseft_edge.runtime.system.machine import cpu
from fseft_edge.runtime.system.user_cache import user_cache

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.bundle import EncoderBundle

SCHEMA_VERSION: Final = 1

_log = logging.getLogger(__name__)


class _Record(BaseModel):
    """Seconds for each ``BACKEND PRECISION`` that was measured (:func:`remember`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_id: str
    device: str
    versions: dict[str, str]
    seconds_a_window: dict[str, float]


class _Records(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    records: tuple[_Record, ...] = ()


def speeds_file() -> Path:
    """Return the path of the file of measured speeds.

    Raises:
        EnvironmentProblemError: the account has no home folder.
    """
    return user_cache() / "speeds.json"


def device_name(device: torch.device) -> str:
    """Return the model name of a device; for a CPU also the number of threads, because the speed depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu().model}, {torch.get_num_threads()} threads"


def remembered_order(bundle: EncoderBundle, device: torch.device) -> list[tuple[str, str]] | None:
    """Return backends and precisions in the order of their measured speed, or ``None`` if there is no valid record.

    A file that cannot be read is skipped with a warning.
    """
    records = [record for record in _read().records if record.encoder_id == bundle.encoder_id]
    here = device_name(device) if records else ""
    record = next((record for record in records if record.device == here), None)
    if record is None:
        return None
    if record.versions != installed_versions():
        _log.info(
            "the measured speeds of backends are not used, because they belong to other versions: run fseft-edge "
            "benchmark again"
        )
        return None
    fastest_first = sorted(record.seconds_a_window, key=record.seconds_a_window.__getitem__)
    return [(backend, precision) for backend, _, precision in (pair.partition(" ") for pair in fastest_first)]


def remember(bundle: EncoderBundle, device: torch.device, seconds_a_window: Mapping[tuple[str, str], float]) -> Path:
    """Store measured speeds, and return the path of the file. An earlier record of the encoder and device is replaced.

    Args:
        bundle: encoder that was measured.
        device: device on which it was measured.
        seconds_a_window: seconds of each backend and precision. Only their order matters. For an encoder that computes
            whole scans, they are the seconds for the scans of the benchmark.

    Raises:
        OutOfSpaceError: the file cannot be written.
        EnvironmentProblemError: the account has no home folder.
    """
    new = _Record(
        encoder_id=bundle.encoder_id,
        device=device_name(device),
        versions=installed_versions(),
        seconds_a_window={" ".join(pair): seconds for pair, seconds in seconds_a_window.items()},
    )
    others = [
        record for record in _read().records if (record.encoder_id, record.device) != (new.encoder_id, new.device)
    ]
    file = speeds_file()
    with atomic_path(file) as temporary:
        temporary.write_text(_Records(records=(*others, new)).model_dump_json(indent=2) + "\n", encoding="utf-8")
    return file


def _read() -> _Records:
    try:
        file = speeds_file()
        return _Records.model_validate_json(file.read_bytes()) if file.exists() else _Records()
    except EnvironmentProblemError:
        return _Records()
    except (OSError, ValidationError) as error:
        _log.warning("the measured speeds of backends in %s cannot be read: %s", file, str(error).splitlines()[0])
        return _Records()
