"""Open the encoder and the adapters, and segment one scan in stages. ``segment.py`` runs the stages for many scans.

The stages of a scan are methods of :class:`Segmenter`: ``read`` the scan; ``encode`` it; ``finish``: refit the
classifiers (transduction), label the voxels, post-process and flag the mask, and write the files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.locator import Located
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import MovedThreshold, can_move_thresholds, move_thresholds
from fseft_edge.adaptation.support_set import load_support, of_support_set, read_annotations
from fseft_edge.adaptation.transduction import OrganOutcome, TransductionInputs, refitted_adapters, support_of
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import AdapterFile, AdapterOrgan, PostProcessing
from fseft_edge.adapters.network import Adapter
from fseft_edge.masks.mask_image import Mask
from fseft_edge.masks.memory_plan import MemoryPlan, in_smaller_pieces, plan_segmentation
from fseft_edge.masks.post_processing import post_process
from fseft_edge.masks.prediction import DecidedScan, decide_encoded
from fseft_edge.masks.probabilities import MOST_FILES_AT_A_TIME, ProbabilityFiles, organ_channels
from fseft_edge.masks.quality import quality_flags
from fseft_edge.masks.region import decide_region
from fseft_edge.masks.result import SegmentedCase, SegmentedOrgan
from fseft_edge.outbox.content_key import content_sha256
from fseft_edge.outbox.records import printable
from fseft_edge.report.pictures import three_plane_picture
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import (
    EncodedScan,
    encode_scan,
    held_after_encoding,
    layout_of,
    planned_encoding,
)
from fseft_edge.runtime.encoder.feature_store import FeatureStore, open_store
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand, encode_on_demand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, OutOfSpaceError, UnreadableFileError
from fseft_edge.runtime.scans.annotated import find_pairs
from fseft_edge.runtime.scans.components import masks_of_labels
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import hu_percentiles
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.source_pieces import SourcePiece
from fseft_edge.runtime.scans.sources import Scan, find_scan, scan_name
from fseft_edge.runtime.scans.volume import LabelMap, Volume
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.memory import Budget, is_out_of_memory
from fseft_edge.runtime.system.progress import Progress, SilentProgress
from fseft_edge.runtime.system.threads import side_by_side
from fseft_edge.segmentation.case_files import CaseFiles
from fseft_edge.segmentation.failures import in_words
from fseft_edge.segmentation.label_values import (
    keep_label_values,
    label_values,
    warn_of_new_label_values,
    with_label_values,
)
from fseft_edge.segmentation.located import (
    LOCATED,
    NOTHING_LOCATED,
    WHOLE_SCAN,
    EncodedWindows,
    OrganFinder,
    WholeScan,
    needs_whole_scan,
    open_finder,
    windows_entry,
)
from fseft_edge.segmentation.models import LoadedModels, expects_sizes, load_models
from fseft_edge.segmentation.settings import SegmentationSettings

if TYPE_CHECKING:
    from fseft_edge.dicom_output import SourceHeaders


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ReadCase:
    """A scan that was read, its grid, and the memory plan of its segmentation.

    Attributes:
        scan: the scan before reading.
        volume: voxels and lattice of the scan.
        grid: grid of the encoder.
        plan: memory plan.
        sha256: checksum of the content of the files of the scan; None for a scan in memory, and if a
            file beside the scan cannot be read.
        headers: checked headers of the DICOM series; None if no DICOM object is written.
        warnings: everything that was left out, corrected or assumed so far.
    """

    scan: Scan
    volume: Volume
    grid: Grid
    plan: MemoryPlan
    sha256: str | None
    headers: SourceHeaders | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EncodedCase:
    """A scan with its feature map.

    Attributes:
        case: the scan.
        scan: the scan with its feature map; a map on demand contains only the windows around the organs.
        resources: closing it closes the feature store that contains the map.
        windows: number of windows that the result needed, and why; None for an encoder without windows.
        decided: the labels of all voxels, if only a part of the scan was encoded; else None.
        moves: what happened to the threshold of each organ, if the labels are decided.
        warnings: warnings about the encoding.
    """

    case: ReadCase
    scan: EncodedScan
    resources: ExitStack
    windows: EncodedWindows | None = None
    decided: DecidedScan | None = None
    moves: tuple[MovedThreshold | None, ...] = ()
    warnings: tuple[str, ...] = ()


@contextlib.contextmanager
def open_segmenter(
    settings: SegmentationSettings, progress: Progress | None = None, *, models: LoadedModels | None = None
) -> Iterator[Segmenter]:
    """Open the encoder, move the adapters to its device, and prepare transduction if the settings ask for it.

    Args:
        settings: settings of the segmentation.
        progress: display of the progress; None shows nothing.
        models: adapters and encoder that are already in memory; None reads those that the settings name.

    Raises:
        FseftEdgeError: any error of :func:`load_models` or of
            :func:`fseft_edge.runtime.encoder.session.open_session`.
    """
    progress = progress or SilentProgress()
    models = models or load_models(settings)
    files, bundle = models.adapters, models.bundle
    warn_of_new_label_values(files)
    with (
        open_finder(settings, files, bundle) as finder,
        open_session(bundle, settings.device, settings.backend, precision=settings.precision) as session,
    ):
        for file in files:
            file.adapter.to(session.device)
        refit: _Refit = _unchanged
        if settings.transduction is not None:
            with open_store(settings.cache, settings.cache_gb) as store:
                refit = _refitter(
                    settings.transduction,
                    files,
                    bundle=bundle,
                    session=session,
                    store=store,
                    budget=settings.budget,
                    progress=progress,
                )
        yield Segmenter(settings, files, bundle, session, refit, finder)


@dataclass(frozen=True)
class _Fit:
    """What was fitted to one scan, for each organ; empty if nothing was."""

    moves: Sequence[MovedThreshold | None] = ()
    outcomes: Sequence[OrganOutcome] = ()


_Refit = Callable[[Sequence[AdapterFile], EncodedScan], tuple[Sequence[Adapter], Sequence[OrganOutcome]]]


def _unchanged(files: Sequence[AdapterFile], _: EncodedScan) -> tuple[Sequence[Adapter], Sequence[OrganOutcome]]:
    return [file.adapter for file in files], ()


def _refitter(
    inputs: TransductionInputs,
    files: Sequence[AdapterFile],
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    budget: Budget,
    progress: Progress,
) -> _Refit:
    supports = []
    pairs = find_pairs(inputs.images, inputs.labels)
    for file in files:
        organs = [organ.as_annotated() for organ in file.description.organs]
        annotated = read_annotations(pairs, organs, inputs.labels, file.adapter.settings)
        if file.description.shots:
            volumes = [organ.support_volumes_ml for organ in file.description.organs]
            annotated = of_support_set(annotated, organs, volumes, file.description.support_annotations)
        support = load_support(
            annotated, organs, bundle=bundle, session=session, store=store, budget=budget, progress=progress
        )
        supports.append(support_of(file.adapter, support, inputs.settings, progress))
    return lambda adapters, encoded: refitted_adapters(adapters, encoded, supports, inputs)


@dataclass(frozen=True, eq=False)
class Segmenter:
    """An open encoder with its adapters, and the stages read, encode and finish of a scan."""

    settings: SegmentationSettings
    adapters: Sequence[AdapterFile]
    bundle: EncoderBundle
    session: EncoderSession
    _refit: _Refit
    _finder: OrganFinder | WholeScan

    def read(self, scan: Path | Scan) -> ReadCase:
        """Read a scan, check what its results need from its headers, and plan the memory use of its segmentation."""
        if isinstance(scan, Path):
            scan = find_scan(scan, self.settings.series)
        volume = scan.read()
        headers = self._checked_headers(scan, volume)
        warnings = (*volume.warnings, *(headers.warnings if headers else ()))
        for warning in warnings:
            _LOG.warning("%s: %s", printable(scan.name), warning)
        grid = Grid.of(volume, self.bundle.preprocessing)
        # A budget that is too small is reported before the long computation.
        held = held_after_encoding(grid, self.bundle, self.session)
        adapters = [file.adapter for file in self.adapters]
        try:
            plan = plan_segmentation(
                grid, adapters, self.settings.budget, held, probabilities=self.settings.save_probabilities
            )
        except OutOfMemoryError as segmentation_error:
            try:
                planned_encoding(grid, self.bundle, self.session, self.settings.budget)
            except OutOfMemoryError as encoding_error:
                # The message names a budget that is enough for both steps.
                if encoding_error.least > segmentation_error.least:
                    raise encoding_error from None
            raise
        sha256 = None if scan.path is None else source_sha256(scan.path)
        return ReadCase(scan, volume, grid, plan, sha256, headers, warnings)

    def _checked_headers(self, scan: Scan, volume: Volume) -> SourceHeaders | None:
        if not self.settings.dicom or scan.series is None:
            return None
        from fseft_edge.dicom_output import SourceHeaders  # noqa: PLC0415 - imports pydicom

        return SourceHeaders.checked(scan.series.headers(), volume)

    def encode(self, case: ReadCase, *, whole: bool = False) -> EncodedCase:
        """Return the scan with its feature map. A map in the cache is not computed again.

        If the adapters have locators, only the windows around the organs are encoded, and the voxels are labelled.

        Args:
            case: the scan.
            whole: encode the whole scan in any case.
        """
        with ExitStack() as stack:
            store = stack.enter_context(open_store(self.settings.cache, self.settings.cache_gb))
            finder = WholeScan() if whole else self._finder
            found = (
                finder if isinstance(finder, WholeScan) else finder.find(case.volume, case.grid, store, self.settings)
            )
            if isinstance(found, WholeScan):
                warning, why = found.warning, WHOLE_SCAN
            elif found.missing:
                warning, why = _whole_scan_because(found.missing, "not located"), NOTHING_LOCATED
            else:
                part = self._part(case, found, store)
                empty = self._empty(part)
                if not empty:
                    return replace(part, resources=stack.pop_all())
                warning, why = _whole_scan_because(empty, "not found where they were located"), NOTHING_LOCATED
            scan = encode_scan(
                case.volume,
                bundle=self.bundle,
                session=self.session,
                store=store,
                grid=case.grid,
                budget=self.settings.budget,
            )
            if warning:
                _LOG.warning("%s: %s", printable(case.scan.name), warning)
            windows = None
            if self.bundle.whole_scan is None:
                count = layout_of(case.grid, self.bundle).windows
                windows = EncodedWindows(count, count, why)
            return EncodedCase(case, scan, stack.pop_all(), windows, warnings=(warning,) if warning else ())

    def _empty(self, part: EncodedCase) -> list[str]:
        """Return the organs that have no voxel in a part of a scan."""
        assert part.decided is not None  # noqa: S101 - narrows the type
        names = [organ.name for file in self.adapters for organ in file.description.organs]
        return [name for name, known in zip(names, part.decided.confidence, strict=True) if known is None]

    def _part(self, case: ReadCase, located: Located, store: FeatureStore) -> EncodedCase:
        """Encode the windows around the organs, and label all voxels."""
        scan = encode_on_demand(
            case.volume,
            bundle=self.bundle,
            session=self.session,
            store=store,
            grid=case.grid,
            budget=self.settings.budget,
        )
        features = scan.features
        assert isinstance(features, FeaturesOnDemand)  # noqa: S101 - narrows the type
        adapters = [file.adapter for file in self.adapters]

        def prepare(boxes: Sequence[Box]) -> None:
            features.encode([box.ranges for box in boxes])

        region = in_smaller_pieces(
            case.plan,
            lambda pieces: decide_region(
                scan,
                adapters,
                located.boxes,
                cuts=features.edges,
                plan=pieces,
                prepare=prepare,
            ),
        )
        files, moves = self._following_size(scan, case.plan, region.boxes)
        moved = [file.adapter for file in files]
        if any(one is not other for one, other in zip(moved, adapters, strict=True)):
            region = in_smaller_pieces(
                case.plan,
                lambda pieces: decide_region(
                    scan, moved, located.boxes, cuts=features.edges, plan=pieces, prepare=prepare
                ),
            )
        features.release()
        windows = EncodedWindows(features.asked, features.windows, LOCATED)
        _LOG.info(
            "%s: %d of %d windows were needed, those around the organs",
            printable(case.scan.name),
            windows.windows,
            windows.of,
        )
        return EncodedCase(case, scan, ExitStack(), windows, region.found, moves)

    def finish(self, encoded: EncodedCase, output: Path) -> SegmentedCase:
        """Label every voxel, and write all files of the case into ``output``, where they appear together.

        If a picture or a DICOM object cannot be written although the disk has space, the mask is written without it,
        and the case states this in ``not_written`` and in a warning.
        """
        read = encoded.case
        files = CaseFiles(output, read.scan.name)
        names = [organ.name for file in self.adapters for organ in file.description.organs]
        outputs = files.wanted(self.settings, names)
        with ExitStack() as stack:
            stack.enter_context(encoded.resources)
            folder = stack.enter_context(files.written_together(outputs))
            found, fit = self._decided(encoded, folder, outputs.get("probabilities", ()))
            encoded.resources.close()
            labels, organs = self._measured(read.volume, found, fit)
            write_label_map(folder / files.mask, labels, {organ.label: organ.name for organ in organs})

            def write_one(named: tuple[SegmentedOrgan, str]) -> None:
                organ, name = named
                mask = read.volume.label_map((labels.array == organ.label).view(np.uint8))
                write_label_map(folder / name, mask, {1: organ.name})

            split = zip(organs, outputs.get("split", ()), strict=False)  # no names without --split
            side_by_side(write_one, split, MOST_FILES_AT_A_TIME)
            problems = self._write_extras(files, folder, read, labels, organs)
            warnings = (*read.warnings, *encoded.warnings, *problems.sentences)
            case = SegmentedCase(files.case, output / files.mask, organs, warnings, tuple(problems.not_written))
            files.write_description(
                folder,
                {
                    "organs": [asdict(organ) for organ in organs],
                    "warnings": list(warnings),
                    "label_values": "of the annotations" if keep_label_values(self.adapters) else "new",
                    "shape": list(read.volume.shape),
                    "spacing_mm": [round(float(value), 6) for value in read.volume.spacing],
                    **self.made_with(read.sha256),
                    "outputs": list(outputs),
                    "not_written": list(case.not_written),
                    **windows_entry(encoded.windows),
                    **_fit_summary(organs, fit),
                },
            )
        return case

    def mask(self, scan: Scan) -> Mask:
        """Segment a scan and return its mask in memory."""
        encoded = self.encode(self.read(scan))
        read = encoded.case
        with encoded.resources:
            found, fit = self._decided(encoded)
        labels, organs = self._measured(read.volume, found, fit)
        return Mask.of(labels, organs, (*read.warnings, *encoded.warnings))

    def probabilities(self, scan: Scan) -> NDArray[np.float32]:
        """Return the probability of each organ in each voxel of a scan, float32 ``[K, X, Y, Z]``, in memory."""
        encoded = self.encode(self.read(scan), whole=True)
        with encoded.resources:
            refitted, _ = self._fitted(encoded.scan, encoded.case.plan)
            channels = list(organ_channels(refitted))
            probabilities = np.empty((len(channels), *encoded.case.volume.shape), np.float32)

            def keep(piece: SourcePiece) -> None:
                where = [slice(None)] * 3
                where[piece.axis] = slice(piece.start, piece.stop)
                probabilities[(slice(None), *where)] = piece.probabilities[channels]

            in_smaller_pieces(encoded.case.plan, lambda pieces: decide_encoded(encoded.scan, refitted, pieces, keep))
        return probabilities

    def existing(self, scan: Path | Scan, output: Path) -> SegmentedCase | None:
        """Return the result of a scan in ``output`` if it is complete and was made from this scan in this way."""
        path = scan.path if isinstance(scan, Scan) else scan
        # Nothing identifies an adapter that was trained in memory. The classifiers of the encoder have no support set.
        unknown = any(file.sha256 is None and file.description.shots for file in self.adapters)
        if path is None or unknown:
            return None
        files = CaseFiles(output, scan_name(path))
        names = [organ.name for file in self.adapters for organ in file.description.organs]
        digest = source_sha256(path)
        return None if digest is None else files.existing(self.made_with(digest), files.wanted(self.settings, names))

    def check_output(self, name: str, output: Path) -> None:
        """Check, before the work, that all results of a scan of this name can be written.

        Raises:
            InputError: a name would be longer than the file system allows, or the mask in the output folder was changed
                or is of another program.
            OutOfSpaceError: the output folder is not writable.
        """
        names = [organ.name for file in self.adapters for organ in file.description.organs]
        files = CaseFiles(output, name)
        files.check_names(self.settings, names)
        files.check_replaceable()
        check_writable(output / files.description)

    def made_with(self, sha256: str | None) -> dict[str, Any]:
        """Return the entries of the JSON file that determine the mask: scan, encoder, adapters and options.

        Args:
            sha256: checksum of the content of the files of the scan.
        """
        inputs = self.settings.transduction
        located = any(file.locator is not None for file in self.adapters)
        whole_scan = self.settings.whole_scan or needs_whole_scan(self.settings) is not None
        return {
            "source_sha256": sha256,
            "encoder": {"name": self.bundle.manifest.name, "id": self.bundle.encoder_id},
            "adapters": [
                {"sha256": file.sha256, "organs": [organ.name for organ in file.description.organs]}
                for file in self.adapters
            ],
            "options": {
                "series": self.settings.series,
                "largest_component": self.settings.largest_component,
                "fill_holes": self.settings.fill_holes,
                "labels": list(label_values(self.adapters)),
                **({"whole_scan": whole_scan} if located else {}),
                **({"follow_size": self.settings.follow_size} if expects_sizes(self.adapters) else {}),
                "transduction": inputs
                and {
                    "priors": {name: asdict(prior) for name, prior in inputs.priors.items()},
                    "table": {name: asdict(prior) for name, prior in inputs.table.items()},
                    # The sampling of blocks has options of the machine, such as the device; its seed is enough.
                    "settings": {**asdict(inputs.settings), "training": {"seed": inputs.settings.training.seed}},
                },
            },
        }

    def _decided(
        self, encoded: EncodedCase, folder: Path | None = None, probabilities: Sequence[str] = ()
    ) -> tuple[DecidedScan, _Fit]:
        """Return the label of every voxel by position of the organ; write the probabilities if names are given."""
        if encoded.decided is not None:
            return encoded.decided, _Fit(encoded.moves)
        read = encoded.case
        refitted, fit = self._fitted(encoded.scan, read.plan)
        if folder is None or not probabilities:
            return in_smaller_pieces(read.plan, lambda pieces: decide_encoded(encoded.scan, refitted, pieces)), fit
        with ProbabilityFiles(folder, read.volume.shape, refitted) as kept:
            found = in_smaller_pieces(
                read.plan, lambda pieces: decide_encoded(encoded.scan, refitted, pieces, kept.add)
            )
            kept.write([folder / name for name in probabilities], read.volume)
        return found, fit

    def _fitted(self, scan: EncodedScan, plan: MemoryPlan) -> tuple[Sequence[Adapter], _Fit]:
        """Return the adapters for one scan: with moved thresholds, then refitted if the settings ask for it."""
        files, moves = self._following_size(scan, plan)
        refitted, outcomes = self._refit(files, scan)
        return refitted, _Fit(moves, outcomes)

    def _following_size(
        self, scan: EncodedScan, plan: MemoryPlan, boxes: Sequence[Box] | None = None
    ) -> tuple[list[AdapterFile], tuple[MovedThreshold | None, ...]]:
        """Return the adapters with thresholds that follow the expected sizes, and what happened to each organ."""
        files: list[AdapterFile] = []
        moves: list[MovedThreshold | None] = []
        inputs = self.settings.transduction
        # A refit under a prior of the user does not start from a threshold that another range has moved.
        own = {**inputs.priors, **inputs.table} if inputs else {}
        for file in self.adapters:
            ranges = [
                SizePrior(*organ.expected_ml) if organ.expected_ml and organ.name not in own else None
                for organ in file.description.organs
            ]
            if self.settings.follow_size and any(ranges) and can_move_thresholds(file.adapter):
                adapter, moved = in_smaller_pieces(
                    plan, partial(self._moved, file.adapter, scan, ranges=ranges, boxes=boxes)
                )
                files.append(replace(file, adapter=adapter))
                moves += moved
            else:
                files.append(file)
                moves += [None] * len(ranges)
        return files, tuple(moves)

    @staticmethod
    def _moved(
        adapter: Adapter,
        scan: EncodedScan,
        pieces: MemoryPlan,
        *,
        ranges: Sequence[SizePrior | None],
        boxes: Sequence[Box] | None,
    ) -> tuple[Adapter, tuple[MovedThreshold | None, ...]]:
        return move_thresholds(adapter, scan, ranges, boxes=boxes, block=(pieces.tile, pieces.tile, pieces.slab))

    def _measured(self, volume: Volume, found: DecidedScan, fit: _Fit) -> tuple[LabelMap, tuple[SegmentedOrgan, ...]]:
        """Return the mask with post-processing and label values, and the measurements of its organs."""
        positions = post_process(found.labels, self._post_processing)
        labels = volume.label_map(with_label_values(positions, label_values(self.adapters)))
        return labels, tuple(_measured_organs(volume, labels, found.confidence, self.adapters, fit))

    def _write_extras(
        self, files: CaseFiles, folder: Path, read: ReadCase, labels: LabelMap, organs: Sequence[SegmentedOrgan]
    ) -> _Problems:
        """Write the picture and the DICOM objects; return what could not be written."""
        problems = _Problems(files.case)
        if self.settings.preview:
            with problems.noted("preview", "The picture"):
                masks = {organ.name: (labels.array == organ.label, None) for organ in organs}
                values = {organ.name: organ.label for organ in organs}
                three_plane_picture(read.volume, masks, folder / files.picture, labels=values)
        if read.headers is None:
            return problems
        for kind in dict.fromkeys(self.settings.dicom):
            with problems.noted(kind, f"The DICOM object {kind}"):
                from fseft_edge.dicom_output import SegmentationAlgorithm, write_dicom_results  # noqa: PLC0415 - imports pydicom

                (written,) = write_dicom_results(
                    folder,
                    files.case,
                    [kind],
                    labels=labels,
                    organs=organs,
                    source=read.headers.images,
                    algorithm=SegmentationAlgorithm.of(
                        self.bundle.encoder_id, self.adapters, transductive=self.settings.transduction is not None
                    ),
                )
                if written.path is None:
                    problems.add(f"The DICOM object {kind} was not written, because the mask is empty.")
        return problems

    @property
    def _post_processing(self) -> list[PostProcessing]:
        keep, fill = self.settings.largest_component, self.settings.fill_holes
        return [
            PostProcessing(
                organ.post_processing.largest_component if keep is None else keep,
                organ.post_processing.fill_holes if fill is None else fill,
            )
            for file in self.adapters
            for organ in file.description.organs
        ]


def _measured_organs(
    volume: Volume,
    labels: LabelMap,
    confidence: Sequence[float | None],
    adapters: Sequence[AdapterFile],
    fit: _Fit,
) -> Iterator[SegmentedOrgan]:
    organs: list[tuple[AdapterFile, AdapterOrgan]] = [
        (file, organ) for file in adapters for organ in file.description.organs
    ]
    values = label_values(adapters)
    masks = masks_of_labels(labels.array, values)
    for position, ((file, organ), label, mask) in enumerate(zip(organs, values, masks, strict=True)):
        volume_ml = float(mask.voxels) * labels.voxel_volume_mm3 / 1000
        hu = hu_percentiles(volume, mask)
        certainty = confidence[position] if hu else None  # post-processing may have removed every voxel
        flags = quality_flags(
            mask,
            volume_ml,
            organ.support_volumes_ml,
            confidence=certainty,
            method=file.adapter.settings.method,
            median_hu=hu.median if hu else None,
            support_hu=organ.support_hu,
        )
        if fit.moves and (moved := fit.moves[position]) and moved.changes_much:
            flags += ("threshold_moved",)
        if fit.outcomes:
            flags += fit.outcomes[position].flags
        known = organ.support_volumes_ml
        yield SegmentedOrgan(
            name=organ.name,
            label=label,
            volume_ml=round(volume_ml, 3),
            flags=flags,
            support_ml=(min(known), max(known)) if known else None,
            confidence=None if certainty is None else round(certainty, 4),
            median_hu=hu.median if hu else None,
        )


class _Problems:
    """The outputs of a case that could not be written beside its mask."""

    def __init__(self, case: str) -> None:
        self._case = case
        self.sentences: list[str] = []
        self.not_written: list[str] = []

    def add(self, sentence: str) -> None:
        self.sentences.append(sentence)
        _LOG.warning("%s: %s", printable(self._case), sentence)

    @contextlib.contextmanager
    def noted(self, output: str, what: str) -> Iterator[None]:
        """Note an error of the body. An error of disk or memory is raised, because it concerns the mask too."""
        try:
            yield
        except (OutOfSpaceError, OutOfMemoryError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.not_written.append(output)
            if isinstance(error, FseftEdgeError):
                self.add(f"{what} was not written. {error.message}")
            else:  # the text of the error may contain values of a header
                self.add(f"{what} was not written. {in_words(error)}. This is a bug: please report it.")


def source_sha256(path: Path) -> str | None:
    """Return the checksum of the content of the files of a scan; None if a file in its folder cannot be read."""
    try:
        return content_sha256(path)
    except UnreadableFileError:
        return None


def _whole_scan_because(organs: Sequence[str], reason: str) -> str:
    return f"The whole scan was encoded, because these organs were {reason}: {', '.join(organs)}."


def _fit_summary(organs: Sequence[SegmentedOrgan], fit: _Fit) -> dict[str, Any]:
    """Return the entries of the JSON file about what was fitted to the scan."""
    summary: dict[str, Any] = {}
    moved = [(organ, move) for organ, move in zip(organs, fit.moves, strict=False) if move is not None]
    if moved:
        summary["thresholds"] = [
            {
                "name": organ.name,
                "before_ml": round(move.before_ml, 3),
                "after_ml": round(move.after_ml, 3),
                "log_odds": round(move.log_odds, 3),
                "notes": move.flags,
            }
            for organ, move in moved
        ]
    if fit.outcomes:
        summary["transduction"] = [
            {
                "name": organ.name,
                "before_ml": outcome.before_ml,
                "after_ml": outcome.after_ml,
                "prior": outcome.prior and asdict(outcome.prior),
                "notes": outcome.flags,
            }
            for organ, outcome in zip(organs, fit.outcomes, strict=True)
        ]
    return summary
