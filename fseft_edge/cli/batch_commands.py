"""The overnight batch: `batch run`, `status`, `retry` and `cancel`."""

from __future__ import annotations

import json
import logging
import signal
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from fseft_edge.cli.options import PATH, Common, common_options, dicom_option, logging_options
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import SomeCasesFailedError

if TYPE_CHECKING:
    from fseft_edge.batch.settings import StopRequest
    from fseft_edge.dicom_output import DicomKind

_LIMIT_HELP = "Minutes a case may take."
_IDS_HELP = "Name the files of the inbox too; their names may be patients'."
_STATE_HELP = "The state file, if it does not lie in OUTBOX; on a local disk."


@click.group()
def batch() -> None:
    """Segment every scan that arrives in a folder, overnight and unattended."""


@batch.command("run")
@click.argument("inbox", type=PATH)
@click.option("-o", "--output", "outbox", type=PATH, required=True, help="OUTBOX: folder for results and state.")
@click.option("--adapter", "adapters", type=PATH, multiple=True, required=True, help="Adapter; may be repeated.")
@click.option("--encoder", type=PATH, help="Encoder bundle.  [default: the adapter's, beside it or in this folder]")
@click.option("--watch", is_flag=True, help="When all is done, wait for more.")
@click.option("--until", metavar="HH:MM", help="Begin no case after this time of day.")
@click.option(
    "--workers",
    default="auto",
    show_default=True,
    metavar="N",
    help="Worker processes. One keeps a GPU or a few cores busy.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help=_LIMIT_HELP,
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often a case may crash or take too long before it is set aside.",
)
@click.option(
    "--settle",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds for which a scan's files must not change.",
)
@click.option("--one-by-one", is_flag=True, help="Do not overlap the stages of cases: slower, in less memory.")
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler whose workers do the cases: tcp://HOST:8786.")
@click.option("--show-ids", is_flag=True, help=_IDS_HELP)
@click.option("--state", type=PATH, help=_STATE_HELP)
@dicom_option
@common_options
def run(
    *,
    inbox: Path,
    outbox: Path,
    adapters: tuple[Path, ...],
    encoder: Path | None,
    watch: bool,
    until: str | None,
    workers: str,
    limit: float,
    attempts: int,
    settle: float,
    one_by_one: bool,
    scheduler: str | None,
    show_ids: bool,
    state: Path | None,
    dicom: tuple[DicomKind, ...],
    common: Common,
) -> None:
    """Segment the scans in INBOX, each exactly once; run again after a crash, it goes on where it was.

    Ctrl-C finishes the cases in hand; pressed again, it stops at once.
    """
    from fseft_edge.batch.coordinator import run_batch  # noqa: PLC0415 - brings in torch
    from fseft_edge.batch.settings import (  # noqa: PLC0415 - likewise
        BatchSettings,
        StopRequest,
        parse_until,
        parse_workers,
    )
    from fseft_edge.segmentation.segmenter import SegmentationSettings  # noqa: PLC0415 - likewise

    if not common.quiet:  # unattended runs say what they do; their log holds no names
        logging.getLogger("fseft_edge.batch").setLevel(logging.INFO)
    segmentation = SegmentationSettings(
        adapters,
        encoder,
        preview=True,
        dicom=dicom,
        cache=common.cache,
        cache_gb=common.cache_gb,
        device=common.device,
        backend=common.backend,
        precision=common.precision,
        memory_gb=common.memory,
        vram_gb=common.vram,
    )
    settings = BatchSettings(
        inbox,
        outbox,
        segmentation,
        state=state,
        watch=watch,
        until=parse_until(until, datetime.now().astimezone()) if until else None,
        workers=parse_workers(workers),
        limit_minutes=limit,
        attempts=attempts,
        settle=settle,
        pipeline=not one_by_one,
        scheduler=scheduler,
        show_ids=show_ids,
    )
    stop = StopRequest()
    _listen(stop)
    summary = run_batch(settings, stop)
    ended = f"{summary.done} done and {summary.failed} failed in this run, {summary.waiting} waiting"
    click.echo(f"{ended}: {outbox / 'report.html'}")
    if summary.failed:
        raise SomeCasesFailedError(
            f"{summary.failed} cases failed.",
            remedy=f"`fseft-edge batch status {outbox}` says why; `batch retry` lets them wait for another run.",
        )


@batch.command()
@click.argument("outbox", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--show-ids", is_flag=True, help=_IDS_HELP)
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def status(*, outbox: Path, as_json: bool, show_ids: bool, state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options' signature
    """Say where every case of OUTBOX stands."""
    with BatchStore(state_path(outbox, state)) as store:
        cases, duplicates = store.cases(), store.duplicates()
    if as_json:
        listed = [_as_dict(case, show_ids=show_ids) for case in cases]
        click.echo(json.dumps({"schema_version": 1, "cases": listed, "duplicates": len(duplicates)}, indent=2))
        return
    for case in cases:
        name = f"{case.key}  {case.source_name}" if show_ids else case.key
        click.echo(f"{name}  {case.state}{f'  {case.reason} {case.remedy}' if case.reason else ''}")
    counts = ", ".join(f"{sum(case.state == state for case in cases)} {state.replace('_', ' ')}" for state in CaseState)
    click.echo(f"{len(cases)} cases: {counts}; {len(duplicates)} found twice")


@batch.command()
@click.argument("outbox", type=PATH)
@click.argument("keys", nargs=-1, metavar="[CASE]...")
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def retry(*, outbox: Path, keys: tuple[str, ...], state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options' signature
    """Let cases that failed, were set aside or cancelled wait again; all of them unless some are named."""
    with BatchStore(state_path(outbox, state)) as store:
        click.echo(f"{store.retry(keys)} cases wait again; `batch run` does them")


@batch.command()
@click.argument("outbox", type=PATH)
@click.argument("keys", nargs=-1, metavar="[CASE]...")
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def cancel(*, outbox: Path, keys: tuple[str, ...], state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options' signature
    """Take waiting cases out, all of them unless some are named; failures that are named too. The rest goes on."""
    with BatchStore(state_path(outbox, state)) as store:
        click.echo(f"{store.cancel(keys)} cases cancelled")


@batch.command("install-service")
@click.argument("inbox", type=PATH)
@click.option("-o", "--output", "outbox", type=PATH, required=True, help="OUTBOX: folder for results and state.")
@click.option("--adapter", "adapters", type=PATH, multiple=True, required=True, help="Adapter; may be repeated.")
@click.option("--encoder", type=PATH, help="Encoder bundle.  [default: the adapter's, beside it or in this folder]")
@click.option("--at", default="18:00", show_default=True, metavar="HH:MM", help="When the batch begins, every day.")
@click.option("--until", default="06:30", show_default=True, metavar="HH:MM", help="When it begins no more cases.")
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), default=60.0, help=_LIMIT_HELP, show_default=True)
@click.option("--state", type=PATH, help=_STATE_HELP)
@dicom_option
@click.option("--units", type=PATH, help="Folder for the unit files.  [default: ~/.config/systemd/user]")
@logging_options
def install_service(
    *,
    inbox: Path,
    outbox: Path,
    adapters: tuple[Path, ...],
    encoder: Path | None,
    at: str,
    until: str,
    limit: float,
    state: Path | None,
    dicom: tuple[DicomKind, ...],
    units: Path | None,
    quiet: bool,
) -> None:
    """Write systemd units that run the batch every night; nothing is started."""
    from fseft_edge.batch.service import NAME, write_units  # noqa: PLC0415 - only this command needs it
    from fseft_edge.batch.settings import parse_until  # noqa: PLC0415 - brings in torch
    from fseft_edge.segmentation.segmenter import SegmentationSettings, load_models  # noqa: PLC0415 - likewise

    now = datetime.now().astimezone()
    begin, end = (parse_until(moment, now).strftime("%H:%M") for moment in (at, until))
    wanted = SegmentationSettings(adapters, encoder)
    settings = wanted.absolute(load_models(wanted).bundle.path)
    command = [str(Path(sys.executable).with_name("fseft-edge")), "batch", "run", str(inbox.absolute())]
    command += ["--output", str(outbox.absolute()), "--encoder", str(settings.encoder)]
    command += [word for adapter in settings.adapters for word in ("--adapter", str(adapter))]
    command += ["--watch", "--until", end, "--limit", f"{limit:g}"]
    command += [word for kind in dicom for word in ("--dicom", kind)]
    command += ["--state", str(state.absolute())] if state else []
    folder = units or Path.home() / ".config" / "systemd" / "user"
    written = write_units(folder, command, at=begin, limit_minutes=limit)
    click.echo(f"{written.service}\n{written.timer}")
    if not quiet:
        click.echo(
            f"Start it with: systemctl --user daemon-reload && systemctl --user enable --now {NAME}.timer\n"
            "and let it run when nobody is logged in: loginctl enable-linger",
            err=True,
        )


def _as_dict(case: CaseRecord, *, show_ids: bool) -> dict[str, object]:
    known = asdict(case)
    source = known.pop("source")
    return {**known, "source": str(source)} if show_ids else known


def _listen(stop: StopRequest) -> None:
    """Turn Ctrl-C and `kill` into requests: the first ends the run after the cases in hand, the second at once."""

    def requested(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal handler's signature
        stop.times += 1
        click.echo("Stopping now." if stop.now else "Finishing the cases in hand; once more stops at once.", err=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` wants it to go on
            signal.signal(number, requested)
