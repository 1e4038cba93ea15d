"""The commands about this machine: `doctor` and `benchmark`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fseft_edge.cli.options import PATH, counted, device_option, logging_options
from fseft_edge.cli.start import loading
from fseft_edge.cli.tables import echo_table
from fseft_edge.runtime.errors import SomeCasesFailedError
from fseft_edge.runtime.system.progress import open_progress


@click.command()
@click.argument("encoders", metavar="[ENCODER]...", type=PATH, nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@logging_options
def doctor(*, encoders: tuple[Path, ...], as_json: bool, quiet: bool) -> None:  # noqa: ARG001 - logging_options passes quiet
    """Show what this machine can run, which backends can run each ENCODER bundle, and which software to install."""
    from fseft_edge.machine.doctor import diagnose  # noqa: PLC0415 - only this command needs it
    from fseft_edge.machine.doctor_page import diagnosis_tables  # noqa: PLC0415 - only this command needs it

    diagnosis = diagnose(encoders)
    if as_json:
        click.echo(json.dumps(diagnosis.as_dict(), indent=2))
        return
    for table in diagnosis_tables(diagnosis):
        echo_table(table)


@click.command()
@click.argument("encoder", type=PATH)
@click.option(
    "--scan",
    "scans",
    type=PATH,
    multiple=True,
    help="CT (NIfTI), or folder of CTs. May be repeated.  [default: a built-in phantom]",
)
@click.option("--adapter", type=PATH, help="Adapter with which to segment the scans.  [default: only encode the scans]")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="Backend to measure. May be repeated.  [default: all backends that can run the encoder]",
)
@device_option
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of measurements of each backend."
)
@click.option("--json", "json_file", type=PATH, help="JSON file to write the results to.")
@click.option(
    "--remember",
    is_flag=True,
    help="Store the order of the backends by speed, so that `--backend auto` uses the fastest backend.",
)
@logging_options
def benchmark(
    *,
    encoder: Path,
    scans: tuple[Path, ...],
    adapter: Path | None,
    backends: tuple[str, ...],
    device: str,
    rounds: int,
    json_file: Path | None,
    remember: bool,
    quiet: bool,
) -> None:
    """Measure speed and memory of each backend with the bundle ENCODER on this machine, on windows and whole scans."""
    with loading():
        from fseft_edge.machine.speed import benchmark as run  # noqa: PLC0415 - brings in torch
        from fseft_edge.machine.speed_tables import speed_tables  # noqa: PLC0415 - only this command needs it
        from fseft_edge.runtime.system.atomic import check_writable  # noqa: PLC0415 - only this command needs it

    if json_file is not None:
        check_writable(json_file)
    with open_progress(quiet=quiet) as progress:
        report = run(
            encoder,
            scans=scans,
            adapter=adapter,
            backends=backends,
            device=device,
            rounds=rounds,
            remember=remember,
            progress=progress,
        )
    if json_file is not None:
        report.to_json(json_file)
    for table in speed_tables(report):
        echo_table(table)
    if report.remembered is not None:
        click.echo(f"Order of backends stored for --backend auto: {report.remembered}")
    for failure in report.failures:
        click.echo(f"{failure.what}: {failure.message} {failure.remedy}", err=True)
    if report.failures:
        raise SomeCasesFailedError(
            f"{counted(len(report.failures), 'measurement')} failed.",
            remedy="Correct the problems listed above and measure again; the tables contain the other measurements.",
        )
