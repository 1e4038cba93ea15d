"""What `fseft-edge benchmark` found to be fast on this machine, remembered for ``auto``.

One small file of the user's, ``$XDG_CACHE_HOME/fseft-edge/speeds.json`` (without the variable, ``~/.cache``). It holds
names of processors and GPUs, versions, encoder ids and seconds; nothing of scans. A record counts as long as encoder,
device and every installed version are those that it was made with. Removing the file is safe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fseft_edge.runtime.errors import EnvironmentProblemError
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.libraries import installed_versions
from fseft_edge.runtime.system.machine import cpu

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.bundle import EncoderBundle

SCHEMA_VERSION: Final = 1

_log = logging.getLogger(__name__)


class _Record(BaseModel):
    """Seconds a window of each ``BACKEND PRECISION``; a competitor that was not measured is not there."""

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
    """Return where speeds are remembered.

    Raises:
        EnvironmentProblemError: the account has no home folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # a relative path is ignored, as the XDG Base Directory Specification says
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise EnvironmentProblemError(
                "This account has no home folder to remember speeds in.", remedy="Set XDG_CACHE_HOME to a folder."
            ) from error
    return root / "fseft-edge" / "speeds.json"


def device_name(device: torch.device) -> str:
    """Return the device's model; of a CPU also the number of threads, which its speed depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu().model}, {torch.get_num_threads()} threads"


def remembered_order(bundle: EncoderBundle, device: torch.device) -> list[tuple[str, str]] | None:
    """Return backends and precisions in the order of their speed here, or ``None`` where nothing valid is known.

    A file that cannot be read is no reason to fail: it is passed over with a warning.
    """
    records = [record for record in _read().records if record.encoder_id == bundle.encoder_id]
    here = device_name(device) if records else ""
    record = next((record for record in records if record.device == here), None)
    if record is None:
        return None
    if record.versions != installed_versions():
        _log.info("the remembered speeds of backends are of other versions; measure again")
        return None
    fastest_first = sorted(record.seconds_a_window, key=record.seconds_a_window.__getitem__)
    return [(backend, precision) for backend, _, precision in (way.partition(" ") for way in fastest_first)]


def remember(bundle: EncoderBundle, device: torch.device, seconds_a_window: Mapping[tuple[str, str], float]) -> Path:
    """Keep what was measured, in place of an earlier record of this encoder and device; return the file.

    Raises:
        OutOfSpaceError: the file cannot be written.
        EnvironmentProblemError: the account has no home folder.
    """
    new = _Record(
        encoder_id=bundle.encoder_id,
        device=device_name(device),
        versions=installed_versions(),
        seconds_a_window={" ".join(way): seconds for way, seconds in seconds_a_window.items()},
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
        _log.warning("the remembered speeds of backends in %s cannot be read: %s", file, str(error).splitlines()[0])
        return _Records()
