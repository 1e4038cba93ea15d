"""All errors that have a cause outside the program. Each class is one kind of error and has an exit code.

Exit codes: 0 success, 1 unexpected error (a bug), 2 wrong use, 3 bad input, 4 environment, 5 some cases failed.
The command line maps an exception to its exit code in one place and prints ``message`` and ``remedy``.
It prints a traceback only for an exception that is not a :class:`FseftEdgeError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar


class FseftEdgeError(Exception):
    """Base class of all errors that have a cause outside the program.

    Args:
        message: one sentence that names the file or value and states the problem.
        remedy: one sentence that states what the user can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling with all attributes, so that a worker process can send the error to its parent process."""
        return partial(type(self), remedy=self.remedy), (self.message,), self.__dict__


class UsageError(FseftEdgeError):
    """Options or arguments are invalid, or cannot be used together."""

    exit_code = 2


class InputError(FseftEdgeError):
    """The user gave a file or folder with wrong or unusable content."""

    exit_code = 3


class UnreadableFileError(InputError):
    """A file is missing, truncated, or not in the expected format."""


class NotACtError(InputError):
    """A readable image is not a single CT volume: for example 4D, colour, one slice, or intensities not in HU."""


class GeometryError(InputError):
    """The voxel lattice of an image is missing or degenerate, or differs from the lattice that it must match."""


class ArchiveError(InputError):
    """A zip archive is encrypted or damaged, or its unpacked size exceeds the limit."""


class NoSeriesError(InputError):
    """A file, folder or archive contains no readable DICOM series of CT slices."""


class ChooseSeriesError(InputError):
    """Several DICOM series match the request, or none does."""


class SeveralPatientsError(ChooseSeriesError):
    """A file, folder or archive contains DICOM images of more than one patient."""


class OtherModalityError(NotACtError):
    """The modality of a DICOM series is not CT."""


class LocaliserError(NotACtError):
    """A DICOM series contains localisers (scouts): overview images for planning a CT."""


class SecondaryCaptureError(NotACtError):
    """A DICOM series contains screenshots or scanned pictures, which have no HU values."""


class SliceStackError(GeometryError):
    """The slices of a DICOM series do not form one stack with equal distances."""


class MissingSliceError(SliceStackError):
    """One or more slices within a DICOM series are missing."""


class DuplicateSliceError(SliceStackError):
    """A DICOM series has several slices at the same position: copies, or phases of a dynamic scan."""


class UnevenSlicesError(SliceStackError):
    """The distances between the slices of a DICOM series are unequal, or slices are shifted sideways."""


class GantryTiltError(SliceStackError):
    """A DICOM series was acquired with a tilted gantry, so that each slice is shifted relative to the next."""


class MixedSeriesError(InputError):
    """One DICOM series contains images of several patients, studies, frames of reference or geometries."""


class RescaleError(InputError):
    """The headers of a DICOM series do not define how stored values convert to HU."""


class PixelFormatError(InputError):
    """The pixel format of a DICOM series is not a pixel format of CT."""


class NoDecoderError(InputError):
    """No installed decoder, or no supported decoder, can decompress a DICOM series."""


class LabelError(InputError):
    """An annotation is not a valid label map, or lacks a requested label value."""


class EncoderBundleError(InputError):
    """An encoder bundle is incomplete, was changed, or has an unknown schema."""


class CheckpointError(InputError):
    """A checkpoint is unreadable, unsafe, or belongs to another network."""


class AdapterError(InputError):
    """An adapter file is damaged, has an unknown schema, or was made with another encoder."""


class BatchStateError(InputError):
    """The state of a batch is damaged, was written by a newer version, or belongs to other adapters."""


class EnvironmentProblemError(FseftEdgeError):
    """The machine lacks a resource, such as a backend, memory or disk space."""

    exit_code = 4


class MissingBackendError(EnvironmentProblemError):
    """A requested inference backend or optional package is not installed, or cannot run on this machine."""


class ParityError(EnvironmentProblemError):
    """The output of an exported graph differs from the output of the toolkit. The graph was not written."""


class EngineError(EnvironmentProblemError):
    """A compiled engine is missing or damaged, or was built for another graph, library version or GPU."""


class OutOfSpaceError(EnvironmentProblemError):
    """A disk is full, or a folder is not writable."""


class OutOfMemoryError(EnvironmentProblemError):
    """The work needs more memory than the machine has or the memory budget allows.

    Args:
        message: one sentence that states the problem.
        remedy: one sentence that states what the user can do.
        least: smallest sufficient budget in bytes, if a budget is too small; else 0.
    """

    def __init__(self, message: str, *, remedy: str, least: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.least = least


class SomeCasesFailedError(FseftEdgeError):
    """A run over several cases finished, and at least one case failed.

    Args:
        message: one sentence that states how many cases failed.
        remedy: one sentence that states what the user can do.
        completed: results of the successful cases.
    """

    exit_code = 5

    def __init__(self, message: str, *, remedy: str, completed: Sequence[object] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.completed = tuple(completed)
