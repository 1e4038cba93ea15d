"""Every error a user can cause or meet: one class a kind, each with an exit code and a remedy.

Exit codes: 0 done, 1 unexpected (a bug), 2 wrong use, 3 bad input, 4 environment, 5 some cases failed.
The command line maps an exception to its exit code in one place and prints ``message`` and ``remedy``;
a traceback is shown only for what is not a :class:`FseftEdgeError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar


class FseftEdgeError(Exception):
    """A failure that has a cause outside the program, a remedy, and an exit code.

    Args:
        message: what is wrong, one sentence that names the file or value.
        remedy: what the user can do about it, one sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        """Let another process have the error whole; by itself Python would build it from the message alone."""
        return partial(type(self), remedy=self.remedy), (self.message,), self.__dict__


class UsageError(FseftEdgeError):
    """Options or arguments that contradict one another or make no sense together."""

    exit_code = 2


class InputError(FseftEdgeError):
    """A file or folder that the user gave is not what it should be."""

    exit_code = 3


class UnreadableFileError(InputError):
    """A file is missing, truncated, or not in the format its name promises."""


class NotACtError(InputError):
    """A readable image is not a single CT volume (4D, colour, one slice, intensities that are no HU)."""


class GeometryError(InputError):
    """A lattice is missing, degenerate, or differs from the one it must equal."""


class ArchiveError(InputError):
    """A zip archive is encrypted, damaged, or larger unpacked than is allowed."""


class NoSeriesError(InputError):
    """Nothing in a file, folder or archive is a DICOM series of CT slices that can be read."""


class ChooseSeriesError(InputError):
    """Several DICOM series could be meant, or the one that was named is not there."""


class SeveralPatientsError(ChooseSeriesError):
    """DICOM images of more than one patient lie together."""


class OtherModalityError(NotACtError):
    """DICOM images of another modality than CT."""


class LocaliserError(NotACtError):
    """A DICOM series of localisers (scouts), the overview images that a CT is planned on."""


class SecondaryCaptureError(NotACtError):
    """A DICOM series of screenshots or scanned pictures, which hold no HU."""


class SliceStackError(GeometryError):
    """The slices of a DICOM series are not one even stack."""


class MissingSliceError(SliceStackError):
    """A DICOM series has a gap where slices should be."""


class DuplicateSliceError(SliceStackError):
    """A DICOM series has several slices at one place: copies, or phases of a dynamic scan."""


class UnevenSlicesError(SliceStackError):
    """The slices of a DICOM series lie at uneven distances, or not above one another."""


class GantryTiltError(SliceStackError):
    """The slices of a DICOM series are shifted against one another by a tilted gantry."""


class MixedSeriesError(InputError):
    """One DICOM series holds images of several patients, studies or frames of reference."""


class RescaleError(InputError):
    """A DICOM series does not say how its stored values become HU."""


class PixelFormatError(InputError):
    """The pixels of a DICOM series are stored in a way in which no CT is."""


class NoDecoderError(InputError):
    """A DICOM series is compressed in a way for which no decoder is installed, or for which there is none."""


class LabelError(InputError):
    """Annotations do not contain what was asked for."""


class EncoderBundleError(InputError):
    """An encoder bundle is incomplete, changed, or of an unknown schema."""


class CheckpointError(InputError):
    """A checkpoint is unreadable, unsafe, or of another network."""


class AdapterError(InputError):
    """An adapter file is damaged, of an unknown schema, or was made with another encoder."""


class BatchStateError(InputError):
    """The state of a batch is damaged, from a newer version, or of other adapters."""


class EnvironmentProblemError(FseftEdgeError):
    """The machine lacks something: a backend, memory, disk space."""

    exit_code = 4


class MissingBackendError(EnvironmentProblemError):
    """An inference backend, or an extra that was asked for, is not installed or cannot run on this machine."""


class ParityError(EnvironmentProblemError):
    """An exported graph does not compute what the toolkit itself computes, so it was not written."""


class EngineError(EnvironmentProblemError):
    """A compiled engine is missing, damaged, or of another graph, library version or GPU."""


class OutOfSpaceError(EnvironmentProblemError):
    """A disk is full or not writable."""


class OutOfMemoryError(EnvironmentProblemError):
    """The work does not fit into the memory of the machine or the budget given.

    Args:
        message: see :class:`FseftEdgeError`.
        remedy: likewise.
        least: bytes that would be enough, where a budget is too small.
    """

    def __init__(self, message: str, *, remedy: str, least: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.least = least


class SomeCasesFailedError(FseftEdgeError):
    """A run over several cases finished, but not for all of them.

    Args:
        message: see :class:`FseftEdgeError`.
        remedy: see the same.
        completed: results of the cases that did not fail.
    """

    exit_code = 5

    def __init__(self, message: str, *, remedy: str, completed: Sequence[object] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.completed = tuple(completed)
