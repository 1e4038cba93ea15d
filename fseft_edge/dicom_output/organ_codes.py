"""Coded concepts of organ names, for example the SNOMED CT code of ``kidney_left``.

This module contains no code values. Its tables contain the keywords of concepts in pydicom's copy of the context groups
of the standard (PS3.16); the code values come from that copy.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from fseft_edge.runtime.scans.organ_names import organ_words

PRIVATE_SCHEME: Final = "99FSEFTEDGE"
"""Coding scheme of names that are in no table below; "99" marks a private coding scheme (PS3.16 section 8.2)."""

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
"""Paired organs: the side in the name becomes a laterality modifier."""

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


@dataclass(frozen=True)
class OrganCode:
    """Codes of an organ in DICOM.

    Attributes:
        category: code from CID 7150, Segmentation Property Categories.
        kind: code from CID 7151 and the context groups included in it, or a code of :data:`PRIVATE_SCHEME`.
        side: code from CID 244, Laterality; None if the name has no side or the organ is not paired.
    """

    category: Code
    kind: Code
    side: Code | None = None

    @property
    def private(self) -> bool:
        """Whether the code belongs to the private coding scheme, because the name is in no table of this module."""
        return self.kind.scheme_designator == PRIVATE_SCHEME


def organ_code(name: str) -> OrganCode:
    """Return the coded concept of an organ name.

    Upper or lower case, spaces, ``_`` and ``-``, a plural ``s`` and the position of the side have no effect:
    ``left_kidney``, ``kidney_left``, ``Kidney_L`` and ``Left Kidney`` get the same code. A name with further words
    (``liver_segment_4``) gets a private code, whose meaning is the name.
    """
    organ, sides = organ_words(name)
    anatomical = codes.CID7150.AnatomicalStructure
    for key in (organ, organ.removesuffix("s")):
        if len(sides) <= 1 and key in _PAIRED:
            side = getattr(codes.CID244, sides[0]) if sides else None
            return OrganCode(anatomical, getattr(codes.SCT, _PAIRED[key]), side)
        sided = f"{''.join(sides).lower()}{key}"  # the left atrium has a separate code
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
    """Return a code of the private scheme. A code value has at most 16 characters (VR SH)."""
    value = name if re.fullmatch(r"[A-Za-z0-9_-]{1,16}", name) else hashlib.sha256(name.encode()).hexdigest()[:16]
    return Code(value, PRIVATE_SCHEME, name[:64])
