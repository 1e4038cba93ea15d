"""One case of a batch, from its source in the inbox to its folder in the outbox: the stages, and what comes of them."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Outcome, StageSeconds
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, OutOfSpaceError
from fseft_edge.runtime.scans.nifti import SUFFIXES
from fseft_edge.runtime.system.atomic import atomic_folder
from fseft_edge.runtime.system.memory import is_out_of_memory
from fseft_edge.segmentation.segmenter import EncodedCase, OpenedCase, Segmenter

RECORD_FILE: Final = "batch.json"
"""In a case's folder: what it was made with and how it went. The folder appears whole, so where this is, all is."""

_SCHEMA_VERSION: Final = 1
Result = TypeVar("Result")


@dataclass(frozen=True)
class CaseTask:
    """A case to do."""

    key: str
    source: Path


class CaseError(Exception):
    """What went wrong with a case, without a word that could name a patient; ``outcome`` says it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


@dataclass(eq=False)
class CaseUnderWay:
    """A case between its stages, with the time that each took."""

    task: CaseTask
    link: tempfile.TemporaryDirectory[str]
    seconds: list[float] = field(default_factory=list)
    opened: OpenedCase | None = None
    encoded: EncodedCase | None = None


@dataclass(frozen=True, eq=False)
class CaseWork:
    """The stages of a case, each of which raises :class:`CaseError` only.

    The source is read through a link named by the case's key, so that no file name of the inbox gets into a message,
    a log or a result.

    Attributes:
        segmenter: with which scans are segmented.
        outbox: folder of the results; each case gets a folder of its own there.
        fingerprint: what all cases of the outbox are segmented with.
    """

    segmenter: Segmenter
    outbox: Path
    fingerprint: str

    def read(self, task: CaseTask) -> CaseUnderWay:
        """Read the scan."""
        try:
            case = CaseUnderWay(task, tempfile.TemporaryDirectory(prefix="fseft-edge-"))
            link = Path(case.link.name) / f"{task.key}{_suffix(task.source)}"
            link.symlink_to(task.source.absolute())
        except OSError as error:  # its own words name the source
            problem = OutOfSpaceError(
                f"No temporary file can be made: {error.strerror}.", remedy="See to the disk that TMPDIR lies on."
            )
            raise CaseError(outcome_of(problem, task.key, task.source)) from None
        case.opened = self._stage(case, lambda: self.segmenter.open(link))
        return case

    def encode(self, case: CaseUnderWay) -> CaseUnderWay:
        """Compute its features."""
        opened = case.opened
        assert opened is not None  # noqa: S101 - stages come in order
        case.encoded = self._stage(case, lambda: self.segmenter.encode(opened))
        return case

    def finish(self, case: CaseUnderWay) -> Outcome:
        """Make the mask and put the case's folder into the outbox, whole."""
        encoded = case.encoded
        assert encoded is not None  # noqa: S101 - stages come in order
        return self._stage(case, lambda: self._finish(case, encoded))

    def _finish(self, case: CaseUnderWay, encoded: EncodedCase) -> Outcome:
        started = time.monotonic()
        read, encode = case.seconds
        with case.link, atomic_folder(self.outbox / case.task.key, overwrite=True) as folder:
            done = self.segmenter.finish(encoded, folder)
            seconds = StageSeconds(read, encode, time.monotonic() - started)
            outcome = Outcome(CaseState.DONE, done.organs, seconds)
            write_record(folder, outcome, self.fingerprint)
        return outcome

    @staticmethod
    def _stage(case: CaseUnderWay, work: Callable[[], Result]) -> Result:
        started = time.monotonic()
        try:
            result = work()
        except Exception as error:
            if case.encoded is not None:
                case.encoded.resources.close()
            case.link.cleanup()
            raise CaseError(outcome_of(error, case.task.key, Path(case.link.name))) from None
        case.seconds.append(time.monotonic() - started)
        return result


def outcome_of(error: Exception, key: str, folder: Path) -> Outcome:
    """Return what an error says of a case, in words that name it by its key alone."""
    if not isinstance(error, FseftEdgeError) and is_out_of_memory(error):
        error = OutOfMemoryError(
            "Memory ran out.", remedy="Close other programs, give a budget by --memory, or use a larger machine."
        )
    if isinstance(error, FseftEdgeError):
        reason, remedy = (
            text.replace(f"{folder}/", "").replace(str(folder), key) for text in (error.message, error.remedy)
        )
        return Outcome(CaseState.FAILED, problem=type(error).__name__, reason=reason, remedy=remedy)
    # An unforeseen error's own words may quote the file: where it arose is enough to find it.
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Outcome(
        CaseState.FAILED,
        problem=type(error).__name__,
        reason=f"An unexpected {type(error).__name__} in {Path(where.filename).name}, line {where.lineno}.",
        remedy="This is a bug in fseft-edge: please report it. `fseft-edge segment` on this scan shows all of it.",
    )


def write_record(folder: Path, outcome: Outcome, fingerprint: str) -> None:
    """Write into a case's folder what the state of the batch holds of it."""
    assert outcome.seconds is not None  # noqa: S101 - of a case that is done
    record = {
        "schema_version": _SCHEMA_VERSION,
        "recipe": fingerprint,
        "organs": [asdict(organ) for organ in outcome.organs],
        "seconds": asdict(outcome.seconds),
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, fingerprint: str) -> Outcome | None:
    """Return the outcome of a case that is in the outbox already, or None where none of this fingerprint is."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["schema_version"] != _SCHEMA_VERSION or record["recipe"] != fingerprint:
            return None
        organs = tuple(SegmentedOrgan.from_json(organ) for organ in record["organs"])
        return Outcome(CaseState.DONE, organs, StageSeconds(**record["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _suffix(source: Path) -> str:
    """Return what the reader tells files by, and nothing else of the name."""
    return next((suffix for suffix in (*SUFFIXES, ".zip") if source.name.lower().endswith(suffix)), "")
