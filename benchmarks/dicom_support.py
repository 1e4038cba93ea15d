"""The head-and-neck benchmark through DICOM: the same adapter from structure sets as from label maps?

    python benchmarks/dicom_support.py --output runs/dicom

Writes five support scans as CT series with one RT Structure Set each, in a folder of patients, trains an adapter from
them and another one from the NIfTI files of the same scans, and scores both on `test`. The structure sets are written
by the toolkit itself, so the table shows what is lost on the way through contours, not the contours of a clinic.

The result is OUTPUT/dicom_support.json: the DSC of the annotations after the way through contours, and the mean DSC of
both adapters for each organ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import headneck
import numpy as np
from bench import Bench
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.dicom_output.instance import SegmentationAlgorithm
from fseft_edge.dicom_output.structure_set import write_structure_set
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.annotated import find_pairs, read_pair
from fseft_edge.runtime.scans.annotation import annotation_on
from fseft_edge.runtime.scans.image_files import read_ct, read_label_map
from fseft_edge.runtime.scans.organs import organs_of
from fseft_edge.runtime.scans.volume import LabelMap, Volume, labels_on

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
NAMES = {"brainstem": "Brainstem", "spinal_cord": "SpinalCord", "mandible": "Bone_Mandible"}
NAMES |= {"parotid_right": "Parotid_R", "parotid_left": "Parotid_L"}
"""Names of the ROIs: those of TG-263."""


def main() -> None:
    """Write the series, train both adapters, score them and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "dicom_support")
    arguments = parser.parse_args()
    cases = headneck.draw_support(arguments.shots, arguments.draw)
    patients, nifti = arguments.output / "patients", arguments.output / "nifti"
    for case in cases:
        write_patient(case, patients / case)
        for kind, path in (("images", headneck.image_path(case)), ("labels", headneck.label_path(case))):
            (nifti / kind).mkdir(parents=True, exist_ok=True)
            link = nifti / kind / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    bundle = headneck.encoder(None)
    named = {organ.name: organ.name for organ in headneck.ORGANS}
    training = TrainingSettings(seed=arguments.draw)
    cache = headneck.RUNS / "features"
    trained = {
        "nifti": adapt(
            bundle.path, nifti / "images", nifti / "labels", headneck.ORGANS, None,
            training=training, validate=False, cache=cache,
        ),
        "dicom": adapt(
            bundle.path, patients, patients, named, None, training=training, validate=False, cache=cache,
        ),
    }  # fmt: skip
    scores = {name: score(file) for name, file in trained.items()}
    result = {
        "support": cases,
        "annotations_dsc": round_trip(patients),
        "mean_dsc": {
            organ.name: {name: round(statistics.fmean(of[organ.name]), 4) for name, of in scores.items()}
            for organ in headneck.ORGANS
        },
    }
    (arguments.output / "dicom_support.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def score(file: AdapterFile) -> dict[str, list[float]]:
    """Return the DSC of each organ in the cases of `test`."""
    bundle = headneck.encoder(None)
    found: dict[str, list[float]] = {}
    with open_session(bundle) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        for case in headneck.split("test"):
            for organ, dsc in bench.score(case, file.adapter).items():
                found.setdefault(organ, []).append(dsc)
    return found


def round_trip(patients: Path) -> dict[str, list[float]]:
    """Return the DSC of each organ after the way through contours, for each case."""
    organs = organs_of([organ.name for organ in headneck.ORGANS])
    found: dict[str, list[float]] = {organ.name: [] for organ in organs}
    for pair in find_pairs(patients, patients):
        volume = pair.scan.read()
        annotation = annotation_on(volume, read_pair(pair, organs))
        reference = labels_on(volume, read_label_map(headneck.label_path(pair.scan.name)))
        for wanted, original in zip(organs, headneck.ORGANS, strict=True):
            dsc = dice(annotation.mask(wanted.label), reference.mask(original.label))
            found[wanted.name].append(round(dsc or 0.0, 4))
    return found


def write_patient(case: str, folder: Path) -> None:
    """Write the CT of a case as a DICOM series, and its annotation as an RT Structure Set in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    volume = read_ct(headneck.image_path(case))
    labels = labels_on(volume, read_label_map(headneck.label_path(case)))
    headers = write_series(volume, case, folder)
    values = {organ.label for organ in headneck.ORGANS}
    kept = LabelMap(np.where(np.isin(labels.array, list(values)), labels.array, 0), labels.affine)
    organs = [
        SegmentedOrgan(name=NAMES[organ.name], label=organ.label, volume_ml=0.0, flags=()) for organ in headneck.ORGANS
    ]
    write_structure_set(folder / "structures.dcm", kept, organs, headers, SegmentationAlgorithm("none"))


def write_series(volume: Volume, case: str, folder: Path) -> list[Dataset]:
    """Write a CT with the axes P, L, I as axial slices, one file each, and return their headers."""
    if volume.axcodes != "PLI":
        sys.exit(f"{case} has the axes {volume.axcodes} instead of PLI")
    directions = RAS_TO_LPS @ volume.affine[:3, :3]
    origin = RAS_TO_LPS @ volume.affine[:3, 3]
    rows, columns, _ = volume.spacing
    uids = {name: generate_uid(entropy_srcs=[case, name]) for name in ("study", "series", "frame")}
    headers = []
    for number in range(volume.shape[2]):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[case, str(number)])
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = case, case, "", ""
        image.StudyInstanceUID, image.SeriesInstanceUID = uids["study"], uids["series"]
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = uids["frame"], ""
        image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "", "", "", ""
        image.ReferringPhysicianName, image.Modality, image.InstanceNumber = "", "CT", number + 1
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.Rows, image.Columns = volume.shape[0], volume.shape[1]
        image.PixelSpacing = [format_number_as_ds(rows), format_number_as_ds(columns)]
        image.SliceThickness = format_number_as_ds(volume.spacing[2])
        image.ImageOrientationPatient = [
            format_number_as_ds(value) for value in (*directions[:, 1] / columns, *directions[:, 0] / rows)
        ]
        image.ImagePositionPatient = [format_number_as_ds(value) for value in origin + number * directions[:, 2]]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = 1, 0, "HU"
        headers.append(image)
        written = Dataset(image)
        hu = volume.hu((slice(None), slice(None), slice(number, number + 1)))
        written.PixelData = np.rint(hu[..., 0]).astype("<i2").tobytes()
        written.file_meta = FileMetaDataset()
        written.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        written.save_as(folder / f"slice_{number:03}.dcm", enforce_file_format=True)
    return headers


if __name__ == "__main__":
    main()
