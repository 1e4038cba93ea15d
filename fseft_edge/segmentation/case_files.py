"""The files of a case: their names, the JSON file, and the check whether a complete result exists."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from fseft_edge._version import __version__
from fseft_edge.masks.probabilities import file_stems
from fseft_edge.masks.result import MASK_SHA256, SegmentedCase, SegmentedOrgan
from fseft_edge.runtime.errors import InputError
from fseft_edge.runtime.system.atomic import atomic_files
from fseft_edge.runtime.system.json_text import parse_json

_SCHEMA_VERSION: Final = 1
_EARLIER_FILES: Final = (".png", ".seg.dcm", ".rtstruct.dcm")
"""Suffixes of the files of a result whose JSON file has no list of files, as earlier versions wrote it."""

_USUAL_LONGEST_NAME: Final = 255


class WantedOutputs(Protocol):
    """The settings of a segmentation that ask for files besides the mask and its JSON file."""

    @property
    def preview(self) -> bool:
        """Whether a picture is written."""

    @property
    def dicom(self) -> Sequence[str]:
        """DICOM objects that are written."""

    @property
    def save_probabilities(self) -> bool:
        """Whether the probabilities of each organ are written."""

    @property
    def split(self) -> bool:
        """Whether a separate mask of each organ is written."""


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case in its output folder.

    Attributes:
        output: output folder.
        case: name of the case.
    """

    output: Path
    case: str

    @property
    def mask(self) -> str:
        """Name of the mask file."""
        return f"{self.case}.nii.gz"

    @property
    def description(self) -> str:
        """Name of the JSON file."""
        return f"{self.case}.json"

    @property
    def picture(self) -> str:
        """Name of the picture."""
        return f"{self.case}.png"

    def dicom(self, kind: str) -> str:
        """Return the name of a DICOM object."""
        return f"{self.case}.{kind}.dcm"

    def masks(self, organs: Sequence[str]) -> list[str]:
        """Return the path of the separate mask of each organ, relative to the output folder."""
        stems = file_stems(organs)
        return [f"{self.case}/{stems[organ]}.nii.gz" for organ in organs]

    def probabilities(self, organs: Sequence[str]) -> list[str]:
        """Return the path of the probabilities of each organ, relative to the output folder.

        A file name of an organ contains no dot, so the path differs from those of all separate masks.
        """
        stems = file_stems(organs)
        return [f"{self.case}/{stems[organ]}.probability.nii.gz" for organ in organs]

    def wanted(self, settings: WantedOutputs, organs: Sequence[str]) -> Mapping[str, list[str]]:
        """Return the files of each output that the settings ask for, besides the mask and its JSON file."""
        outputs: dict[str, list[str]] = {}
        if settings.preview:
            outputs["preview"] = [self.picture]
        for kind in dict.fromkeys(settings.dicom):
            outputs[kind] = [self.dicom(kind)]
        if settings.save_probabilities:
            outputs["probabilities"] = self.probabilities(organs)
        if settings.split:
            outputs["split"] = self.masks(organs)
        return outputs

    def check_names(self, settings: WantedOutputs, organs: Sequence[str]) -> None:
        """Check, before the work, that the file system allows the names of all files of the case.

        Raises:
            InputError: a name would be longer than the file system allows.
        """
        others = [name for names in self.wanted(settings, organs).values() for name in names]
        names = [part for name in (self.mask, self.description, *others) for part in Path(name).parts]
        longest, allowed = max(len(os.fsencode(name)) for name in names), _longest_name(self.output)
        if longest > allowed:
            raise InputError(
                f"The name of the scan is too long: a result would have a file name of {longest} bytes, but {allowed} "
                "are allowed.",
                remedy=f"Make the name of the scan at least {longest - allowed} bytes shorter.",
            )

    def check_replaceable(self) -> None:
        """Check, before the work, that no mask is lost that a person or another program wrote.

        Raises:
            InputError: the mask in the output folder is not the mask that its JSON file describes.
        """
        mask = self.output / self.mask
        if not mask.exists():
            return
        found = self._earlier_description()
        # A JSON file of an earlier version has no checksum.
        if "organs" in found and (MASK_SHA256 not in found or found[MASK_SHA256] == _sha256(mask)):
            return
        raise InputError(
            f"{mask} is not a mask that `fseft-edge segment` wrote, or was changed afterwards. It is not replaced.",
            remedy="Move the mask to another folder or delete it, or give another --output.",
        )

    def written_together(self, outputs: Mapping[str, list[str]]) -> AbstractContextManager[Path]:
        """Yield a folder into which all files of the case are written; they replace an earlier result together.

        The JSON file appears first and the mask last. Files of an earlier result, and files of the wanted outputs, are
        deleted if they are not written again, because they show another mask.

        Args:
            outputs: files of each wanted output.
        """
        wanted = [name for names in outputs.values() for name in names]
        outdated = [*self._names_of(self._earlier_description()), *wanted]
        return atomic_files(self.output, first=self.description, last=self.mask, outdated=outdated)

    def write_description(self, folder: Path, fields: Mapping[str, Any]) -> None:
        """Write the JSON file, with the checksum of every other file of the case in ``folder``."""
        digests = {
            path.relative_to(folder).as_posix(): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != self.description
        }
        content = {
            "schema_version": _SCHEMA_VERSION,
            "case": self.case,
            **fields,
            "toolkit_version": __version__,
            MASK_SHA256: digests.pop(self.mask),
            "files": digests,
        }
        (folder / self.description).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def existing(self, made_with: Mapping[str, Any], outputs: Mapping[str, list[str]]) -> SegmentedCase | None:
        """Return the result in the output folder if it is complete and was made in the same way; else None.

        Args:
            made_with: entries of the JSON file that determine the mask: scan, encoder, adapters, options.
            outputs: files of each wanted output; an output may have fewer files, if organs are empty.
        """
        found = self._earlier_description()
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, AttributeError):
            complete = (
                found[MASK_SHA256] == _sha256(self.output / self.mask)
                and all(found[key] == value for key, value in json.loads(json.dumps(made_with)).items())
                and set(outputs) <= set(found["outputs"])
                and not found["not_written"]
                and all(_sha256(self.output / name) == digest for name, digest in found["files"].items())
            )
            if complete:
                organs = tuple(SegmentedOrgan.from_json(organ) for organ in found["organs"])
                warnings = tuple(map(str, found["warnings"]))
                return SegmentedCase(self.case, self.output / self.mask, organs, warnings, existing=True)
        return None

    def _earlier_description(self) -> dict[str, Any]:
        """Return the content of the JSON file in the output folder; empty if there is none."""
        try:
            found = parse_json((self.output / self.description).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _names_of(self, description: Mapping[str, Any]) -> Iterator[str]:
        """Yield the names of all files of a result, except mask and JSON file."""
        if "organs" not in description:  # not a result of this toolkit
            return
        files = description.get("files")
        if not isinstance(files, dict):
            files = {f"{self.case}{suffix}": "" for suffix in _EARLIER_FILES}
        for name in files:
            # The file can have been changed: nothing outside the files of this case is deleted.
            if name.startswith((f"{self.case}.", f"{self.case}/")) and ".." not in Path(name).parts:
                yield name


def _longest_name(folder: Path) -> int:
    """Return the largest number of bytes of a file name in a folder, which need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        return os.pathconf(existing, "PC_NAME_MAX")
    except OSError:
        return _USUAL_LONGEST_NAME


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
