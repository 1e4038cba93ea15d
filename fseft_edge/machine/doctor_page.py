"""Tables of a diagnosis of the machine, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from fseft_edge.machine.doctor import BackendOnDevice, Diagnosis, EncoderDiagnosis
    from fseft_edge.runtime.system.machine import Gpu

_NONE = "–"


def diagnosis_tables(diagnosis: Diagnosis) -> Iterator[Table]:
    """Yield tables of the machine, the libraries, each encoder, and the advice."""
    yield _machine(diagnosis)
    yield _libraries(diagnosis)
    for encoder in diagnosis.encoders:
        yield _encoder(encoder)
    if diagnosis.advice:
        yield _advice(diagnosis)


def _table(title: str, *columns: str, header: bool = True) -> Table:
    from rich.table import Table  # noqa: PLC0415 - only needed for tables

    table = Table(title=title, title_justify="left", show_header=header, title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    return table


def _machine(diagnosis: Diagnosis) -> Table:
    machine = diagnosis.machine
    table = _table("This machine", "property", "value", header=False)
    rows = [
        ("fseft-edge", f"{diagnosis.version} on Python {machine.python}, {machine.system}"),
        ("processor", f"{machine.cpu.model}, {machine.cpu.usable_cores} of {machine.cpu.cores} cores usable"),
        ("instructions", ", ".join(machine.cpu.instructions) or "no instructions that make encoding faster"),
    ]
    if machine.memory:
        rows.append(("memory", f"{gib(machine.memory.free_bytes)} of {gib(machine.memory.total_bytes)} free"))
    rows += [(disk.purpose, f"{gib(disk.free_bytes)} free in {disk.folder}") for disk in machine.disks]
    if machine.driver:
        rows.append(("NVIDIA driver", machine.driver))
    rows += [(f"GPU {number}", _gpu(gpu)) for number, gpu in enumerate(machine.gpus)] or [("GPU", "no NVIDIA GPU")]
    for row in rows:
        table.add_row(*map(_escaped, row))
    return table


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.compute_capability:
        parts.append(f"compute capability {gpu.compute_capability}")
    if gpu.free_bytes is not None and gpu.total_bytes is not None:
        parts.append(f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free")
    if gpu.seen_by != "torch":
        parts.append("PyTorch cannot use it")
    return ", ".join(parts)


def _libraries(diagnosis: Diagnosis) -> Table:
    table = _table("Libraries", "library", "version", "state", "notes")
    for found in diagnosis.libraries:
        wheels = [wheel for wheel in found.wheels if wheel != found.module]
        notes = [*([f"wheel {', '.join(wheels)}"] if wheels else []), *found.offers]
        if found.state == "broken":
            notes.append(str(found.problem))
        state = {"ready": "ready", "missing": "not installed", "broken": "broken"}[found.state]
        table.add_row(*map(_escaped, (found.module, found.version or _NONE, state, ", ".join(notes))))
    return table


def _encoder(encoder: EncoderDiagnosis) -> Table:
    title = f"{encoder.path}: {encoder.name}, {encoder.tiling}, id {encoder.encoder_id[:12]}"
    table = _table(title, "backend", "device", "precision", "usable", "remedy")
    for row in encoder.backends:
        table.add_row(*map(_escaped, (row.backend, row.device, row.precision, _verdict(row), row.remedy or "")))
    return table


def _verdict(row: BackendOnDevice) -> str:
    if row.reason is None:
        return "yes, used by auto" if row.chosen else "yes"
    return f"no: {row.reason}"


def _advice(diagnosis: Diagnosis) -> Table:
    table = _table("What to do", "problem", "remedy")
    table.columns[0].no_wrap = False
    for advice in diagnosis.advice:
        table.add_row(_escaped(advice.problem), _escaped(advice.remedy))
    return table


def _escaped(text: str) -> str:
    """Return the text with square brackets escaped: ``fseft-edge[cpu]`` must not be read as markup."""
    from rich.markup import escape  # noqa: PLC0415 - only needed for tables

    return escape(text)


def gib(size: int) -> str:
    """Return a number of bytes as text in GiB."""
    return f"{size / 2**30:.1f} GiB"
