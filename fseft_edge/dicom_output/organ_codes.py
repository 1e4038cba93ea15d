"""Names of organs as coded concepts: which SNOMED CT code stands for ``kidney_left``.

No code value is written here. The tables name concepts by their keywords in pydicom's copy of the standard's context
groups (PS3.16), and their values come from there.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Literal

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

PRIVATE_SCHEME: Final = "99FSEFTEDGE"
"""Designator of names that no table here knows; "99" marks a private coding scheme (PS3.16, section 8.2)."""

Side = Literal["Left", "Right"]

_PAIRED: Final = {
    "adrenal": "AdrenalGland",
    "adrenalgland": "AdrenalGland",
    "clavicle": "Clavicle",
    "eye": "Eye",
    "femoralhead": "HeadOfFemur",
    "femur": "Femur",
    "humerus": "Humerus",
    "kidney": "Kidney",
    "lens": "Lens",
    "lung": "Lung",
    "opticnerve": "OpticNerve",
    "parotid": "ParotidGland",
    "parotidgland": "ParotidGland",
    "scapula": "Scapula",
    "seminalvesicle": "SeminalVesicle",
    "submandibular": "SubmandibularGland",
    "submandibulargland": "SubmandibularGland",
}
"""Organs of which there are two: the name's side becomes a modifier."""

_SINGLE: Final = {
    "aorta": "Aorta",
    "bladder": "Bladder",
    "bone": "Bone",
    "bonemandible": "Mandible",
    "brain": "Brain",
    "brainstem": "BrainStem",
    "colon": "Colon",
    "duodenum": "Duodenum",
    "esophagus": "Esophagus",
    "gallbladder": "Gallbladder",
    "heart": "Heart",
    "inferiorvenacava": "InferiorVenaCava",
    "ivc": "InferiorVenaCava",
    "larynx": "Larynx",
    "leftatrium": "LeftAtrium",
    "leftventricle": "LeftVentricle",
    "liver": "Liver",
    "mandible": "Mandible",
    "oesophagus": "Esophagus",
    "opticchiasm": "OpticChiasm",
    "pancreas": "Pancreas",
    "pharynx": "Pharynx",
    "pituitary": "Pituitary",
    "portalvein": "PortalVein",
    "postcava": "InferiorVenaCava",
    "prostate": "Prostate",
    "pulmonaryartery": "PulmonaryArtery",
    "rectum": "Rectum",
    "rightatrium": "RightAtrium",
    "rightventricle": "RightVentricle",
    "sacrum": "Sacrum",
    "skin": "Skin",
    "smallbowel": "SmallIntestine",
    "smallintestine": "SmallIntestine",
    "spinalcord": "SpinalCord",
    "spleen": "Spleen",
    "splenicvein": "SplenicVein",
    "sternum": "Sternum",
    "stomach": "Stomach",
    "superiorvenacava": "SuperiorVenaCava",
    "svc": "SuperiorVenaCava",
    "thyroid": "Thyroid",
    "thyroidgland": "Thyroid",
    "trachea": "Trachea",
    "urinarybladder": "Bladder",
    "uterus": "Uterus",
}

_ABNORMAL: Final = {"lesion": "Lesion", "neoplasm": "Neoplasm", "tumor": "Neoplasm", "tumour": "Neoplasm"}

_SIDES: Final[dict[str, Side]] = {
    **dict.fromkeys(("left", "l", "lt"), "Left"),
    **dict.fromkeys(("right", "r", "rt"), "Right"),
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


@dataclass(frozen=True)
class OrganCode:
    """What an organ is called in DICOM.

    Attributes:
        category: of CID 7150, Segmentation Property Categories.
        kind: of CID 7151 and the groups that it includes, or one of :data:`PRIVATE_SCHEME`.
        side: of CID 244, Laterality; None where the name tells none, or the organ is not one of two.
    """

    category: Code
    kind: Code
    side: Code | None = None

    @property
    def private(self) -> bool:
        """Whether the name stands in no table here."""
        return self.kind.scheme_designator == PRIVATE_SCHEME


def organ_code(name: str) -> OrganCode:
    """Return the coded concept of an organ's name.

    Capitals, spaces, ``_`` and ``-``, a plural ``s`` and the place of the side do not matter: ``left_kidney``,
    ``kidney_left``, ``Kidney_L`` and ``Left Kidney`` are one. A name with more in it than an organ and its side
    (``liver_segment_4``) is not guessed at; it gets a private code, whose meaning is the name.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    sides = [_SIDES[word] for word in words if word in _SIDES]
    organ = "".join(word for word in words if word not in _SIDES)
    anatomical = codes.CID7150.AnatomicalStructure
    for key in (organ, organ.removesuffix("s")):
        if len(sides) <= 1 and key in _PAIRED:
            side = getattr(codes.CID244, sides[0]) if sides else None
            return OrganCode(anatomical, getattr(codes.SCT, _PAIRED[key]), side)
        sided = f"{''.join(sides).lower()}{key}"  # the left atrium has a code of its own
        if sided in _SINGLE:
            return OrganCode(anatomical, getattr(codes.SCT, _SINGLE[sided]))
        if not sides and key in _ABNORMAL:
            return OrganCode(codes.CID7150.MorphologicallyAbnormalStructure, getattr(codes.SCT, _ABNORMAL[key]))
    return OrganCode(anatomical, _private_code(name))


def code_item(code: Code) -> Dataset:
    """Return a code as an item of a code sequence (Code Sequence Macro, PS3.3 section 8.8)."""
    item = Dataset()
    item.CodeValue = code.value
    item.CodingSchemeDesignator = code.scheme_designator
    item.CodeMeaning = code.meaning
    return item


def _private_code(name: str) -> Code:
    """Return a code of our own; a code value has room for 16 characters (VR SH)."""
    value = name if re.fullmatch(r"[A-Za-z0-9_-]{1,16}", name) else hashlib.sha256(name.encode()).hexdigest()[:16]
    return Code(value, PRIVATE_SCHEME, name[:64])
