"""The stages of one case of a batch, from its source in the inbox to its result folder in the outbox."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

from fseft_edge.batch.options import same_options
from fseft_edge.masks.result import SegmentedOrgan, describes
from fseft_edge.outbox.records import CaseState, Outcome, StageSeconds
from fseft_edge.outbox.store import FINGERPRINT_KEY
from fseft_edge.runtime.errors import FseftEdgeError, LabelError, OutOfSpaceError, UnreadableFileError
from fseft_edge.runtime.scans.image_names import DETACHED_SUFFIXES, METAIMAGE_SUFFIXES, NRRD_SUFFIXES
from fseft_edge.runtime.scans.nifti import HEADER_SUFFIXES, SUFFIXES
from fseft_edge.runtime.system.atomic import atomic_folder
from fseft_edge.runtime.system.json_text import parse_json
from fseft_edge.segmentation.failures import as_known_error, reason_and_remedy
from fseft_edge.segmentation.segmenter import EncodedCase, ReadCase, Segmenter

RECORD_FILE: Final = "batch.json"
"""Record of the options and times of a case in its result folder. The folder appears complete, by one rename."""

_SCHEMA_VERSION: Final = 1
_SUFFIXES: Final = (*SUFFIXES, *HEADER_SUFFIXES, *NRRD_SUFFIXES, *METAIMAGE_SUFFIXES, ".zip")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CaseTask:
    """A case that a worker has to segment."""

    key: str
    source: Path


class CaseError(Exception):
    """Failure of a case. ``outcome`` contains the reason, without any text that could contain a patient's name."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


@dataclass(eq=False)
class CaseInProgress:
    """A case between two stages, with the wall time of each completed stage in seconds."""

    task: CaseTask
    link: tempfile.TemporaryDirectory[str]
    seconds: list[float] = field(default_factory=list)
    read: ReadCase | None = None
    encoded: EncodedCase | None = None


@dataclass(frozen=True, eq=False)
class CaseWork:
    """The stages of a case. Each stage raises only :class:`CaseError`.

    The source is read through a symbolic link whose name is the key of the case. No file name of the inbox can
    therefore appear in a message, a log line or a result.

    Attributes:
        segmenter: open encoder and adapters.
        outbox: folder of the results, with one folder for each case.
        fingerprint: options fingerprint of the outbox: all options that determine the masks, as text.
    """

    segmenter: Segmenter
    outbox: Path
    fingerprint: str

    def read(self, task: CaseTask) -> CaseInProgress:
        """Read the scan."""
        if task.source.name.lower().endswith(DETACHED_SUFFIXES):
            problem: FseftEdgeError = UnreadableFileError(
                f"{task.key} is a header whose voxels are in another file, which a batch does not read.",
                remedy="Save the scan as one file: .nii.gz, .nrrd or .mha.",
            )
            raise CaseError(failed_outcome(problem, task.key, task.source))
        try:
            case = CaseInProgress(task, tempfile.TemporaryDirectory(prefix="fseft-edge-"))
            link = Path(case.link.name) / f"{task.key}{_suffix(task.source)}"
            link.symlink_to(task.source.absolute())
        except OSError as error:  # str(error) contains the name of the source
            problem = OutOfSpaceError(
                f"No temporary file can be created: {error.strerror}.",
                remedy="Check that the disk of the folder TMPDIR has free space and is writable.",
            )
            raise CaseError(failed_outcome(problem, task.key, task.source)) from None
        case.read = self._stage(case, lambda: self.segmenter.read(link))
        return case

    def encode(self, case: CaseInProgress) -> CaseInProgress:
        """Compute the feature map of the scan."""
        read = case.read
        assert read is not None  # noqa: S101 - the caller runs the stages in order
        case.encoded = self._stage(case, lambda: self.segmenter.encode(read))
        return case

    def finish(self, case: CaseInProgress) -> Outcome:
        """Compute the mask and write the result folder of the case into the outbox, complete or not at all."""
        encoded = case.encoded
        assert encoded is not None  # noqa: S101 - the caller runs the stages in order
        return self._stage(case, lambda: self._finish(case, encoded))

    def _finish(self, case: CaseInProgress, encoded: EncodedCase) -> Outcome:
        started = time.monotonic()
        read, encode = case.seconds
        with case.link, atomic_folder(self.outbox / case.task.key, overwrite=True) as folder:
            done = self.segmenter.finish(encoded, folder)
            seconds = StageSeconds(read, encode, time.monotonic() - started)
            series = encoded.case.scan.series
            outcome = Outcome(
                CaseState.DONE,
                done.organs,
                seconds,
                warnings=done.warnings,
                series=sha256(series.uid.encode()).hexdigest() if series is not None and series.uid else "",
            )
            write_record(folder, outcome, self.fingerprint)
        return outcome

    @staticmethod
    def _stage(case: CaseInProgress, work: Callable[[], Result]) -> Result:
        started = time.monotonic()
        try:
            result = work()
        except Exception as error:
            if case.encoded is not None:
                case.encoded.resources.close()
            case.link.cleanup()
            raise CaseError(failed_outcome(error, case.task.key, Path(case.link.name))) from None
        case.seconds.append(time.monotonic() - started)
        return result


def failed_outcome(error: Exception, key: str, folder: Path) -> Outcome:
    """Return the outcome of a case that raised an error. Its text names the case only by its key.

    The name of the link to the scan, which is the key with a suffix, becomes the key: no inbox has a file of that name.
    """
    error = as_known_error(error)
    link = re.compile(f"{re.escape(f'{folder}/{key}')}({'|'.join(map(re.escape, _SUFFIXES))})")
    reason, remedy = (
        link.sub(key, text).replace(f"{folder}/", "").replace(str(folder), key) for text in reason_and_remedy(error)
    )
    return Outcome(CaseState.FAILED, problem=type(error).__name__, reason=reason, remedy=remedy)


def write_record(folder: Path, outcome: Outcome, fingerprint: str) -> None:
    """Write organs, times and options fingerprint into the result folder of a case, as in the state of the batch."""
    assert outcome.seconds is not None  # noqa: S101 - every case that is done has times
    record = {
        "schema_version": _SCHEMA_VERSION,
        FINGERPRINT_KEY: fingerprint,
        "organs": [asdict(organ) for organ in outcome.organs],
        "seconds": asdict(outcome.seconds),
        "warnings": list(outcome.warnings),
        "series": outcome.series,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, fingerprint: str) -> Outcome | None:
    """Return the outcome of a case whose result is in the outbox; None if there is none with this fingerprint.

    If the mask in the folder is not the one that the JSON file beside it describes, somebody changed it. Then the
    outcome is a failure, so that a mask that a person corrected in the outbox is neither used unseen nor overwritten.
    """
    try:
        record = parse_json((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["schema_version"] != _SCHEMA_VERSION or not same_options(record[FINGERPRINT_KEY], fingerprint):
            return None
        organs = tuple(SegmentedOrgan.from_json(organ) for organ in record["organs"])
        warnings = tuple(map(str, record.get("warnings", [])))  # older versions wrote none
        series = str(record.get("series", ""))  # older versions wrote none
        outcome = Outcome(CaseState.DONE, organs, StageSeconds(**record["seconds"]), warnings=warnings, series=series)
        fields = parse_json((folder / f"{folder.name}.json").read_text(encoding="utf-8"))
        with (folder / f"{folder.name}.nii.gz").open("rb") as mask:
            return outcome if describes(fields, mask) else _changed_outcome(folder.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _changed_outcome(key: str) -> Outcome:
    return Outcome(
        CaseState.FAILED,
        problem=LabelError.__name__,
        reason=f"The mask of {key} in the outbox was changed after it was made.",
        remedy="Move the mask to a folder of corrected masks (--corrected), delete the result folder of the case, and "
        "use `batch retry`.",
    )


def _suffix(source: Path) -> str:
    """Return the suffix by which the reader recognises the file type, and no other part of the file name."""
    return next((suffix for suffix in _SUFFIXES if source.name.lower().endswith(suffix)), "")
