"""Functions that the benchmarks on real CTs have in common: encode, train, score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import headneck

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.support_set import load_support
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel


@dataclass(frozen=True)
class Bench:
    """An open encoder with its feature store."""

    bundle: EncoderBundle
    session: EncoderSession
    store: FeatureStore

    def encoded(self, case: str) -> EncodedScan:
        """Return the features of a case, from the store if the store contains them."""
        volume = read_ct(headneck.image_path(case))
        return encode_scan(volume, bundle=self.bundle, session=self.session, store=self.store)

    def score(self, case: str, adapter: Adapter, organs: Sequence[OrganLabel] = headneck.ORGANS) -> dict[str, float]:
        """Return the DSC of every organ of a case, on the lattice of the scan."""
        reference = read_label_map(headneck.label_path(case)).array
        labels = segment_encoded(self.encoded(case), [adapter])
        return {
            organ.name: float(dice(labels == number, reference == organ.label) or 0.0)
            for number, organ in enumerate(organs, start=1)
        }

    def support(self, cases: Sequence[str], *, variations: int | None = 0, seed: int = 0) -> list[SupportScan]:
        """Return annotated scans with all five organs, and the variations of these scans."""
        annotated = [(headneck.image_path(case), read_label_map(headneck.label_path(case))) for case in cases]
        return load_support(
            annotated,
            headneck.ORGANS,
            bundle=self.bundle,
            session=self.session,
            store=self.store,
            variations=variations,
            seed=seed,
        )

    def train(
        self, support: Sequence[SupportScan], settings: AdapterSettings, training: TrainingSettings
    ) -> TrainedAdapter:
        """Return an adapter for all five organs."""
        rows = head_rows(self.bundle, headneck.ORGANS)
        return train_adapter(settings, support, head_rows=rows, training=training)
