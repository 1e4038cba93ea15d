"""An adapter as an object with the methods ``fit``, ``predict`` and ``predict_proba``, in the style of scikit-learn."""

from __future__ import annotations

import inspect
import statistics
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter, write_adapter
from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.evaluation.evaluate import evaluate
from fseft_edge.export.built_in import open_encoder
from fseft_edge.masks.mask_image import Mask
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.given import GivenLabels, GivenScan, given_scan, one_or_many
from fseft_edge.runtime.scans.organs import GivenOrgans
from fseft_edge.runtime.system.progress import Progress
from fseft_edge.segmentation.models import LoadedModels
from fseft_edge.segmentation.segmenter import Segmenter, open_segmenter
from fseft_edge.segmentation.settings import SegmentationSettings


class OrganSegmenter:
    """An adapter that is trained on annotated scans and then segments other scans.

    The encoder is opened at the first prediction and stays open until :meth:`close`, the end of a ``with`` block, or
    the end of the object.

    Args:
        organs: organs to train, with their label values or names in the annotations (see :func:`fseft_edge.adapt`).
        encoder: encoder bundle, or the name of a built-in encoder.
        settings: kind of adapter; the default is the method ``spatial`` on all levels.
        training: training schedule and seed.
        choose: use the method and the levels with the best cross-validation result.
        validate: run a cross-validation during :meth:`fit`.
        cache: folder of the feature map cache; None keeps no feature maps.
        device: device to compute on (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: number format of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory.
        vram_gb: GPU memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory of the GPU.
        whole_scan: encode whole scans, and train no locator (see :func:`fseft_edge.adapt`).
        follow_size: move thresholds towards the expected sizes, where the adapter says so; masks and probabilities are
            then those of the moved thresholds (:mod:`fseft_edge.adaptation.size_threshold`).
        progress: display of the progress; None shows nothing.

    Attributes:
        adapter_: the trained adapter; exists after :meth:`fit` or :func:`load`.
    """

    adapter_: AdapterFile

    def __init__(
        self,
        organs: GivenOrgans,
        encoder: str | Path = "edge_base",
        *,
        settings: AdapterSettings | None = None,
        training: TrainingSettings | None = None,
        choose: bool = False,
        validate: bool = True,
        cache: str | Path | None = None,
        device: str = "auto",
        backend: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
        memory_gb: float | None = None,
        vram_gb: float | None = None,
        whole_scan: bool = False,
        follow_size: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.organs = organs
        self.encoder = encoder
        self.settings = settings
        self.training = training
        self.choose = choose
        self.validate = validate
        self.cache = cache
        self.device = device
        self.backend = backend
        self.precision = precision
        self.memory_gb = memory_gb
        self.vram_gb = vram_gb
        self.whole_scan = whole_scan
        self.follow_size = follow_size
        self.progress = progress
        self._open: tuple[Segmenter, weakref.finalize[..., Any]] | None = None

    def fit(
        self,
        scans: Sequence[GivenScan],
        labels: Sequence[GivenLabels],
        groups: Sequence[str] | None = None,
    ) -> Self:
        """Train the adapter.

        Args:
            scans: annotated CTs.
            labels: annotation of each CT.
            groups: patient of each CT; scans of one patient are left out together in the cross-validation.

        Raises:
            FseftEdgeError: any error of :func:`fseft_edge.adapt`.
        """
        self.close()
        self.adapter_ = adapt(
            self.encoder,
            scans,
            labels,
            self.organs,
            groups=groups,
            settings=self.settings,
            training=self.training,
            choose=self.choose,
            validate=self.validate,
            cache=self.cache,
            device=self.device,
            backend=self.backend,
            precision=self.precision,
            memory_gb=self.memory_gb,
            vram_gb=self.vram_gb,
            whole_scan=self.whole_scan,
            progress=self.progress,
        )
        return self

    @overload
    def predict(self, scans: GivenScan) -> Mask: ...  # type: ignore[overload-overlap]  # a text is a sequence of texts

    @overload
    def predict(self, scans: Sequence[GivenScan]) -> list[Mask]: ...

    def predict(self, scans: GivenScan | Sequence[GivenScan]) -> Mask | list[Mask]:
        """Segment one CT, or each CT of a list.

        Returns:
            The mask of each CT on the lattice of the CT, with the label values of the annotations.

        Raises:
            UsageError: the adapter is not trained.
            InputError: a CT is not usable.
            OutOfMemoryError: the memory budget is too small for a CT.
        """
        segmenter = self._segmenter()
        single, given = one_or_many(scans)
        masks = [segmenter.mask(given_scan(scan)) for scan in given]
        return masks[0] if single else masks

    @overload
    def predict_proba(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self, scans: GivenScan
    ) -> NDArray[np.float32]: ...

    @overload
    def predict_proba(self, scans: Sequence[GivenScan]) -> list[NDArray[np.float32]]: ...

    def predict_proba(self, scans: GivenScan | Sequence[GivenScan]) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Return the probability of each organ in each voxel of one CT, or of each CT of a list.

        Post-processing has no effect on probabilities. A large CT with many organs needs much memory: four bytes for
        each voxel and organ.

        Returns:
            float32 ``[K, X, Y, Z]`` from 0 to 1 on the lattice of the CT, organs in the order of ``organs``.

        Raises:
            UsageError: the adapter is not trained.
            InputError: a CT is not usable.
            OutOfMemoryError: the memory budget is too small for a CT.
        """
        segmenter = self._segmenter()
        single, given = one_or_many(scans)
        probabilities = [segmenter.probabilities(given_scan(scan)) for scan in given]
        return probabilities[0] if single else probabilities

    def score(self, scans: Sequence[GivenScan], labels: Sequence[GivenLabels]) -> float:
        """Return the mean Dice similarity coefficient of the organs on annotated CTs (:func:`fseft_edge.evaluate`).

        Raises:
            LabelError: no organ is annotated in any of the CTs.
        """
        result = evaluate(self.predict(scans), labels, self.organs)
        return statistics.fmean(summary.dsc.mean for summary in result.summaries() if summary.dsc is not None)

    def save(self, path: str | Path) -> None:
        """Write the trained adapter as an adapter file, ``NAME.adapter``.

        Raises:
            UsageError: the adapter is not trained, or the name does not end in ``.adapter``.
            OutOfSpaceError: the file cannot be written.
        """
        write_adapter(Path(path), self._trained())

    def close(self) -> None:
        """Close the encoder. The next prediction opens it again."""
        if self._open is not None:
            self._open[1]()
            self._open = None

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002 - signature that scikit-learn calls
        """Return the arguments of the constructor, as scikit-learn's ``clone`` needs them."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: object) -> Self:
        """Change arguments of the constructor; the next prediction opens the encoder again.

        Raises:
            UsageError: there is no such argument.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise UsageError(
                    f"OrganSegmenter has no argument {name!r}.", remedy=f"Choose one of these: {', '.join(known)}."
                )
            setattr(self, name, value)
        self.close()
        return self

    def __enter__(self) -> Self:
        """Return the object; the end of the ``with`` block closes the encoder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the encoder."""
        self.close()

    def _trained(self) -> AdapterFile:
        if not hasattr(self, "adapter_"):
            raise UsageError(
                "This OrganSegmenter has no trained adapter yet.",
                remedy="Call fit(scans, labels) first, or open an adapter file with fseft_edge.load(path).",
            )
        return self.adapter_

    def _segmenter(self) -> Segmenter:
        if self._open is None:
            file = self._trained()
            settings = SegmentationSettings(
                (),
                cache=None if self.cache is None else Path(self.cache),
                device=self.device,
                backend=self.backend,
                precision=self.precision,
                memory_gb=self.memory_gb,
                vram_gb=self.vram_gb,
                whole_scan=self.whole_scan,
                follow_size=self.follow_size,
            )
            bundle = open_encoder(self.encoder)
            file.check_encoder(bundle, path=None)
            with ExitStack() as stack:
                opened = open_segmenter(settings, self.progress, models=LoadedModels((file,), bundle))
                segmenter = stack.enter_context(opened)
                self._open = segmenter, weakref.finalize(self, stack.pop_all().close)
        return self._open[0]


def load(
    adapter: str | Path,
    encoder: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
    whole_scan: bool = False,
    follow_size: bool = True,
) -> OrganSegmenter:
    """Return the adapter of an adapter file, ready to segment.

    Args:
        adapter: adapter file, ``NAME.adapter``.
        encoder: encoder bundle, or the name of a built-in encoder; None searches for the bundle beside the adapter, in
            the working folder, and among the built-in encoders that were exported for this user.
        cache: folder of the feature map cache; None keeps no feature maps.
        device: device to compute on (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: number format of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory.
        vram_gb: GPU memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory of the GPU.
        whole_scan: encode and segment whole scans, although the adapter has a locator.
        follow_size: move thresholds towards the expected sizes, where the adapter says so.

    Raises:
        InputError: the adapter or the encoder is not usable, or the encoder is not found.
    """
    path = Path(adapter)
    file = read_adapter(path)
    found = encoder or find_encoder(path, file.description.encoder_id, file.description.encoder_name)
    file.check_encoder(open_encoder(found), path=path)
    model = OrganSegmenter(
        {organ.name: organ.label for organ in file.description.organs},
        found,
        settings=file.adapter.settings,
        cache=cache,
        device=device,
        backend=backend,
        precision=precision,
        memory_gb=memory_gb,
        vram_gb=vram_gb,
        whole_scan=whole_scan,
        follow_size=follow_size,
    )
    model.adapter_ = file
    return model
