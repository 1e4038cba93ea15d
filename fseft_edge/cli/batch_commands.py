"""The commands of the overnight batch: `batch run`, `status`, `retry`, `cancel` and `install-service`."""

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

from fseft_edge.cli.options import (
    PATH,
    Common,
    common_options,
    counted,
    dicom_option,
    follow_size_option,
    logging_options,
    whole_scan_option,
)
from fseft_edge.cli.start import loading
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import SomeCasesFailedError

if TYPE_CHECKING:
    from fseft_edge.batch.settings import StopRequest
    from fseft_edge.dicom_output import DicomKind

_LIMIT_HELP = "Time limit of a case in minutes."
_IDS_HELP = "Also show the file names in the inbox, which may contain patients' names."
_STATE_HELP = "State file of the batch, on a local disk.  [default: in OUTBOX]"


@click.group()
def batch() -> None:
    """Segment every scan that arrives in a folder, overnight and without supervision."""


@batch.command("run")
@click.argument("inbox", type=PATH)
@click.argument("outbox", type=PATH)
@click.option(
    "--adapter", "adapters", type=PATH, multiple=True, required=True, help="Adapter, NAME.adapter. May be repeated."
)
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder bundle, or edge_base (built in).  [default: the adapter's encoder in its folder, the working "
    "folder, or built in]",
)
@click.option("--watch", is_flag=True, help="When all cases are done, wait for new scans.")
@click.option("--until", metavar="HH:MM", help="Start no case after this time of day.")
@click.option(
    "--workers",
    default="auto",
    show_default=True,
    metavar="N",
    help="Number of worker processes. One process is enough for one GPU or a few cores.",
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
    help="Number of crashes or timeouts after which a case is set aside.",
)
@click.option(
    "--settle",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Time in seconds without a change of a scan's files, after which the scan is complete.",
)
@click.option(
    "--one-by-one", is_flag=True, help="Each worker process handles one case at a time: slower, but needs less memory."
)
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler whose workers process the cases: tcp://HOST:8786.")
@click.option("--show-ids", is_flag=True, help=_IDS_HELP)
@click.option("--state", type=PATH, help=_STATE_HELP)
@dicom_option
@click.option(
    "--save-probabilities",
    is_flag=True,
    help="In each result folder, also write the probabilities of each organ, <key>/<organ>.probability.nii.gz.",
)
@click.option(
    "--split", is_flag=True, help="In each result folder, also write a mask of each organ, <key>/<organ>.nii.gz."
)
@whole_scan_option
@follow_size_option
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
    save_probabilities: bool,
    split: bool,
    whole_scan: bool,
    follow_size: bool,
    common: Common,
) -> None:
    """Segment each scan in INBOX exactly once, and write results and state to OUTBOX.

    After a crash, run the command again: finished cases are not repeated.

    Ctrl-C ends the run after the cases in progress; a second Ctrl-C ends the run at once.
    """
    with loading():
        from fseft_edge.batch.coordinator import run_batch  # noqa: PLC0415 - brings in torch
        from fseft_edge.batch.settings import (  # noqa: PLC0415 - brings in torch
            BatchSettings,
            StopRequest,
            parse_until,
            parse_workers,
        )
        from fseft_edge.segmentation.settings import SegmentationSettings  # noqa: PLC0415 - brings in torch

    if not common.quiet:  # an unattended run logs its actions; the log contains no names of patients
        logging.getLogger("fseft_edge.batch").setLevel(logging.INFO)
    segmentation = SegmentationSettings(
        adapters,
        encoder,
        preview=True,
        dicom=dicom,
        save_probabilities=save_probabilities,
        split=split,
        whole_scan=whole_scan,
        follow_size=follow_size,
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
    done = f"{counted(summary.done, 'case')} done"
    if summary.warned:
        done += f" ({summary.warned} with warnings that a person has to read)"
    ended = f"{done} and {summary.failed} failed in this run, {summary.waiting} waiting"
    click.echo(f"{ended}: {outbox / 'report.html'}")
    if summary.failed:
        raise SomeCasesFailedError(
            f"{counted(summary.failed, 'case')} failed.",
            remedy=f"Run `fseft-edge batch status {outbox}` to see the reasons; `fseft-edge batch retry {outbox}` "
            "returns failed cases to the queue.",
        )


@batch.command()
@click.argument("outbox", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the state of all cases as JSON.")
@click.option("--show-ids", is_flag=True, help=_IDS_HELP)
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def status(*, outbox: Path, as_json: bool, show_ids: bool, state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options passes quiet
    """Show the state of every case in OUTBOX."""
    with BatchStore(state_path(outbox, state)) as store:
        cases, duplicates = store.cases(), store.duplicates()
    if as_json:
        listed = [_as_dict(case, show_ids=show_ids) for case in cases]
        click.echo(json.dumps({"schema_version": 1, "cases": listed, "duplicates": len(duplicates)}, indent=2))
        return
    for case in cases:
        name = f"{case.key}  {case.source_name}" if show_ids else case.key
        why = f"  {case.reason} {case.remedy}" if case.reason else ""
        if case.state == CaseState.SUPERSEDED:  # what was wrong with it does not matter any more
            why = f" by {case.superseded_by}"
        click.echo(f"{name}  {case.state}{why}")
        for warning in case.warnings:
            click.echo(f"    warning: {warning}")
    counts = ", ".join(f"{sum(case.state == state for case in cases)} {state.replace('_', ' ')}" for state in CaseState)
    warned = sum(case.state == CaseState.DONE and bool(case.warnings) for case in cases)
    copies = f"{counted(len(duplicates), 'duplicate')} skipped"
    click.echo(f"{counted(len(cases), 'case')}: {counts}; {warned} with warnings; {copies}")


@batch.command()
@click.argument("outbox", type=PATH)
@click.argument("keys", nargs=-1, metavar="[CASE]...")
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def retry(*, outbox: Path, keys: tuple[str, ...], state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options passes quiet
    """Return failed, set-aside and cancelled cases to the queue: the named cases, or all of them without a name."""
    with BatchStore(state_path(outbox, state)) as store:
        returned = counted(store.retry(keys), "case")
    click.echo(f"{returned} returned to the queue; start `fseft-edge batch run` to continue")


@batch.command()
@click.argument("outbox", type=PATH)
@click.argument("keys", nargs=-1, metavar="[CASE]...")
@click.option("--state", type=PATH, help=_STATE_HELP)
@logging_options
def cancel(*, outbox: Path, keys: tuple[str, ...], state: Path | None, quiet: bool) -> None:  # noqa: ARG001 - logging_options passes quiet
    """Cancel waiting cases: the named cases, or all waiting cases without a name. A named case may also have failed."""
    with BatchStore(state_path(outbox, state)) as store:
        click.echo(f"{counted(store.cancel(keys), 'case')} cancelled")


@batch.command("install-service")
@click.argument("inbox", type=PATH)
@click.argument("outbox", type=PATH)
@click.option(
    "--adapter", "adapters", type=PATH, multiple=True, required=True, help="Adapter, NAME.adapter. May be repeated."
)
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder bundle, or edge_base (built in).  [default: the adapter's encoder in its folder, the working "
    "folder, or built in]",
)
@click.option(
    "--at", default="18:00", show_default=True, metavar="HH:MM", help="Time at which the batch starts every day."
)
@click.option(
    "--until", default="06:30", show_default=True, metavar="HH:MM", help="Time after which no more cases are started."
)
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), default=60.0, help=_LIMIT_HELP, show_default=True)
@click.option("--state", type=PATH, help=_STATE_HELP)
@dicom_option
@click.option("--units", type=PATH, help="Folder for the systemd unit files.  [default: ~/.config/systemd/user]")
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
    """Write systemd units that run the batch from INBOX to OUTBOX every night. The command does not start them."""
    with loading():
        from fseft_edge.batch.service import NAME, write_units  # noqa: PLC0415 - only this command needs it
        from fseft_edge.batch.settings import parse_until  # noqa: PLC0415 - brings in torch
        from fseft_edge.segmentation.models import load_models  # noqa: PLC0415 - brings in torch
        from fseft_edge.segmentation.settings import SegmentationSettings  # noqa: PLC0415 - brings in torch

    now = datetime.now().astimezone()
    begin, end = (parse_until(moment, now).strftime("%H:%M") for moment in (at, until))
    wanted = SegmentationSettings(adapters, encoder)
    settings = wanted.absolute(load_models(wanted).bundle.path)
    command = [str(Path(sys.executable).with_name("fseft-edge")), "batch", "run"]
    command += [str(inbox.absolute()), str(outbox.absolute()), "--encoder", str(settings.encoder)]
    command += [word for adapter in settings.adapters for word in ("--adapter", str(adapter))]
    command += ["--watch", "--until", end, "--limit", f"{limit:g}"]
    command += [word for kind in dicom for word in ("--dicom", kind)]
    command += ["--state", str(state.absolute())] if state else []
    folder = units or Path.home() / ".config" / "systemd" / "user"
    written = write_units(folder, command, at=begin, limit_minutes=limit)
    click.echo(f"{written.service}\n{written.timer}")
    if not quiet:
        click.echo(
            f"To start the service: systemctl --user daemon-reload && systemctl --user enable --now {NAME}.timer\n"
            "To run the service when no user is logged in: loginctl enable-linger",
            err=True,
        )


def _as_dict(case: CaseRecord, *, show_ids: bool) -> dict[str, object]:
    known = asdict(case) | {"review": asdict(case.review) if case.review else None}
    source = known.pop("source")
    return {**known, "source": str(source)} if show_ids else known


def _listen(stop: StopRequest) -> None:
    """Handle Ctrl-C and `kill`: the first one ends the run after the cases in progress, the second one at once."""

    def requested(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        stop.times += 1
        click.echo(
            "Stopping now." if stop.now else "Finishing the cases in progress. Press Ctrl-C again to stop now.",
            err=True,
        )

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under `nohup` the run must continue
            signal.signal(number, requested)
