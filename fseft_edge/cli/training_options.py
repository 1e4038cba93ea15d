"""What the commands `adapt` and `finetune` have in common: options for annotated scans, and the printed result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fseft_edge.adaptation import patients
from fseft_edge.cli.options import ORGAN_HELP, PATH, counted, structure_options
from fseft_edge.cli.start import loading
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organs import OrganLabel, parse_organs

if TYPE_CHECKING:
    from fseft_edge.adapters.file import AdapterFile, AdapterOrgan
    from fseft_edge.finetuning.tuning_file import TuningFile
    from fseft_edge.outbox.accepted_masks import ReviewedBatch

ADAPTERS = ("linear", "pointwise", "spatial")
# equal to `fseft_edge.finetuning.settings.TUNING_METHODS`, whose import brings in torch
TUNINGS = ("lora", "adaptformer", "affine", "bitfit", "compacter", "conv-adapter", "med-adapter", "full", "decoder")


@dataclass(frozen=True)
class Support:
    """Options of every command that trains on annotated scans.

    Attributes:
        encoder: path of the encoder bundle.
        images: folder of CTs, or None.
        labels: folder of annotations, or None.
        organs: organs to train.
        reviewed: reviewed batch whose accepted masks are used, or None.
        cases: names of the cases to use, or None for all.
        groups: patient of each case, or a pattern that finds the patient in a case name; None if they are unknown.
        output: path of the file to write.
        seed: seed for all random choices.
        as_json: True prints the metadata of the written file as JSON.
        structure_set: which annotation of a CT to use if there are several in DICOM, or None for the newest approved
            one.
        interpolate: whether slices between contours on every n-th slice are filled.
    """

    encoder: Path
    images: Path | None
    labels: Path | None
    organs: Sequence[OrganLabel]
    reviewed: ReviewedBatch | None
    cases: tuple[str, ...] | None
    groups: patients.GroupRule | None
    output: Path
    seed: int
    as_json: bool
    structure_set: str | None
    interpolate: bool

    @property
    def scans(self) -> tuple[Path, Path | None, Path | None, Sequence[OrganLabel], Path]:
        """The positional arguments of the Python functions for training."""
        return self.encoder, self.images, self.labels, self.organs, self.output

    def print_result(self, file: AdapterFile | TuningFile) -> None:
        """Print the metadata of the written file and the accuracy to expect; as JSON, on one line."""
        made = file.description
        if self.as_json:
            click.echo(made.model_dump_json(exclude={"content_sha256"}))  # only the file itself contains this hash
            return
        for organ in made.organs:
            click.echo(_organ_text(organ))
        if made.support_groups is not None and any(organ.left_out_dsc for organ in made.organs):
            scans, groups = counted(made.shots, "scan"), made.support_groups
            if self.groups is None:
                click.echo(
                    f"Copies of a scan, and scans of one patient, were left out together: {scans} in {groups} groups."
                )
            else:
                click.echo(f"All scans of a patient were left out together: {scans} of {counted(groups, 'patient')}.")
        if self.reviewed is not None and any(organ.left_out_dsc for organ in made.organs):
            click.echo(
                "The expected DSC is too optimistic, because the references include masks made by an adapter. For a "
                "reliable estimate, use scans contoured by a person."
            )
        steps = f", {counted(made.steps, 'step')}, loss {made.losses[-1]:.3f}" if made.steps else ""
        click.echo(f"{self.output}: {made.kind}{steps}")


def support_options(output_help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of :class:`Support`; the command receives ``support``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option("--encoder", type=PATH, required=True, help="Encoder bundle, or edge_base (built in).")
        @click.option("--images", type=PATH, help="Folder of annotated CTs (NIfTI, NRRD, MetaImage), or DICOM.")
        @click.option(
            "--labels",
            type=PATH,
            help="Folder of the annotations: label maps or .seg.nrrd files with the file names of the CTs, or RT "
            "Structure Sets or DICOM Segmentations, which may lie beside their CTs.",
        )
        @click.option(
            "--from-reviewed",
            type=PATH,
            metavar="OUTBOX",
            help="Batch whose accepted masks are used as annotations, in addition to --images and --labels or instead "
            "of them.",
        )
        @click.option(
            "--corrected",
            type=PATH,
            help="With --from-reviewed: folder of corrected masks <key>.nii.gz, which replace the masks of the batch.",
        )
        @click.option(
            "--state",
            type=PATH,
            help="With --from-reviewed: state file of the batch, if `batch run` was started with --state.",
        )
        @click.option("--organ", "organs", multiple=True, required=True, metavar="NAME=ID|ROI", help=ORGAN_HELP)
        @click.option("-o", "--output", type=PATH, required=True, help=output_help)
        @click.option(
            "--case",
            "cases",
            multiple=True,
            help="Use only this case. May be repeated.  [default: all annotated cases]",
        )
        @structure_options
        @click.option(
            "--groups",
            type=PATH,
            metavar="FILE",
            help="CSV file (case,group) with the patient of each case. Cross-validation leaves out all scans of a "
            "patient together.  [default: each scan is of another patient]",
        )
        @click.option(
            "--group-pattern",
            metavar="REGEX",
            help="Instead of --groups: regular expression whose first parentheses contain the patient in a case name, "
            "for example '^(P[0-9]+)_'.",
        )
        @click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Seed for all random choices.",
        )
        @click.option("--json", "as_json", is_flag=True, help="Print the metadata of the written file as JSON.")
        @functools.wraps(command)
        def wrapped(
            *,
            encoder: Path,
            images: Path | None,
            labels: Path | None,
            from_reviewed: Path | None,
            corrected: Path | None,
            state: Path | None,
            organs: tuple[str, ...],
            output: Path,
            cases: tuple[str, ...],
            groups: Path | None,
            group_pattern: str | None,
            seed: int,
            as_json: bool,
            structure_set: str | None,
            interpolate: bool,
            **particular: object,
        ) -> None:
            wanted = parse_organs(organs)
            if from_reviewed is None and (corrected or state):
                raise UsageError(
                    "--corrected and --state can only be used with --from-reviewed.",
                    remedy="Add --from-reviewed, or remove --corrected and --state.",
                )
            reviewed = _reviewed(from_reviewed, state, corrected) if from_reviewed else None
            rule = _groups(groups, group_pattern)
            support = Support(
                encoder,
                images,
                labels,
                wanted,
                reviewed,
                cases or None,
                rule,
                output,
                seed,
                as_json,
                structure_set,
                interpolate,
            )
            command(support=support, **particular)

        return wrapped

    return decorate


class MethodChoice(click.Choice[str]):
    """The methods of one command; the error for a method of the other command names that command."""

    def __init__(self, choices: Sequence[str], elsewhere: Sequence[str], command: str) -> None:
        super().__init__(choices)
        self._elsewhere, self._command = elsewhere, command

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401 - the signature is click's
        """Return the method, or raise click's error for a wrong value."""
        if value in self._elsewhere:
            self.fail(f"{value!r} is a method of another command: `{self._command} --method {value}`.", param, ctx)
        return super().convert(value, param, ctx)


def was_given(name: str) -> bool:
    """Return True if the parameter ``name`` of the running command was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _reviewed(outbox: Path, state: Path | None, corrected: Path | None) -> ReviewedBatch:
    with loading():
        from fseft_edge.outbox.accepted_masks import ReviewedBatch  # noqa: PLC0415 - brings in torch

    return ReviewedBatch(outbox, state, corrected)


def _groups(table: Path | None, pattern: str | None) -> patients.GroupRule | None:
    if table is not None and pattern is not None:
        raise UsageError("--groups and --group-pattern are both given.", remedy="Give only one of them.")
    if table is not None:
        return patients.read_groups(table)
    return patients.group_pattern(pattern) if pattern is not None else None


def _organ_text(organ: AdapterOrgan) -> str:
    volumes, left_out = organ.support_volumes_ml, organ.left_out_dsc
    expected = (
        f"; expected DSC on new scans: {sum(left_out) / len(left_out):.2f} ({min(left_out):.2f} to "
        f"{max(left_out):.2f} on left-out scans)"
        if left_out
        else ""
    )
    done = [name.replace("_", " ") for name, wanted in asdict(organ.post_processing).items() if wanted]
    treated = f"; post-processing of its masks: {', '.join(done)}" if done else ""
    if organ.expected_ml:
        treated += "; its threshold follows its size"
    scans = counted(len(volumes), "scan")
    return f"{organ.name}: {scans}, {min(volumes):.1f} to {max(volumes):.1f} ml{expected}{treated}"
