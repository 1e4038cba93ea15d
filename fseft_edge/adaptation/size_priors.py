"""Priors on organ sizes: from the support set's volumes, from a table of volumes, or given by hand."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import UnreadableFileError, UsageError

_LEAST_GAMMA = 0.3
_UNKNOWN_GAMMA = 0.5
_SPREAD_FROM = 3  # volumes
_OUTLIERS_FROM = 5  # volumes


@dataclass(frozen=True)
class SizePrior:
    """The sizes that an organ may have, in ml."""

    low_ml: float
    high_ml: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high_ml) and 0 <= self.low_ml <= self.high_ml and self.high_ml > 0):
            raise UsageError(
                f"A size prior of {self.low_ml:g} to {self.high_ml:g} ml is impossible.",
                remedy="Give the smaller volume first, and the larger above zero, such as liver=1200..1800ml.",
            )

    @classmethod
    def from_volumes(cls, volumes_ml: Sequence[float], gamma: float | None = None) -> SizePrior:
        """Return ``(1 ∓ γ)`` times the mean volume; with 5 or more, without those beyond a deviation of the median.

        Args:
            volumes_ml: of the organ in several patients.
            gamma: None takes twice the volumes' relative standard deviation, and at least the paper's 0.3, or 0.5 where
                fewer than three volumes tell of no spread: an organ that varies more between patients than its prior
                allows would be pulled away from the truth.

        Raises:
            UsageError: no volume is given.
        """
        if not volumes_ml:
            raise UsageError(
                "There is no volume to make a size prior of.",
                remedy="Give the prior by hand, such as liver=1200..1800ml.",
            )
        volumes = np.asarray(volumes_ml, np.float64)
        if gamma is None:
            gamma = _spread(volumes)
        if len(volumes) >= _OUTLIERS_FROM:
            # Some volume is always that close to the median; the margin is for rounding.
            volumes = volumes[np.abs(volumes - np.median(volumes)) <= volumes.std() * (1 + 1e-9)]
        mean = float(volumes.mean())
        return cls(max(0.0, 1 - gamma) * mean, (1 + gamma) * mean)


def _spread(volumes: NDArray[np.float64]) -> float:
    if len(volumes) < _SPREAD_FROM:
        return _UNKNOWN_GAMMA
    return max(_LEAST_GAMMA, 2 * float(volumes.std(ddof=1) / max(volumes.mean(), 1e-9)))


_PRIOR = re.compile(r"(?P<organ>[A-Za-z0-9_-]+)=(?P<low>[0-9.]+)\.\.(?P<high>[0-9.]+)(?:ml)?")


def parse_size_priors(values: Iterable[str]) -> dict[str, SizePrior]:
    """Return the priors that the values of ``--size-prior`` give by hand, ``NAME=LOW..HIGHml``.

    Raises:
        UsageError: a value is not of that form, is impossible, or names an organ twice.
    """
    priors: dict[str, SizePrior] = {}
    for value in values:
        match = _PRIOR.fullmatch(value.strip())
        try:
            low, high = (float(match[name]) for name in ("low", "high")) if match else (math.nan, math.nan)
        except ValueError:
            match = None
        if match is None:
            raise UsageError(
                f"{value!r} is no size prior.",
                remedy="Write NAME=LOW..HIGHml, such as --size-prior liver=1200..1800ml.",
            )
        if match["organ"] in priors:
            raise UsageError(f"{match['organ']} has two size priors.", remedy="Give each organ one.")
        priors[match["organ"]] = SizePrior(low, high)
    return priors


def read_size_priors(path: Path) -> dict[str, SizePrior]:
    """Return the priors of a table of volumes: CSV with the columns ``organ`` and ``volume_ml``, a measurement a row.

    Raises:
        UnreadableFileError: the file is missing, lacks a column, or holds what is no volume.
    """
    volumes: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"organ", "volume_ml"} <= set(rows.fieldnames or ()):
                raise KeyError
            for row in rows:
                volume = float(row["volume_ml"])
                if not (math.isfinite(volume) and volume > 0):
                    raise ValueError
                volumes.setdefault(row["organ"].strip(), []).append(volume)
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableFileError(
            f"{path} is no table of organ volumes.", remedy="Give a CSV file with the columns organ and volume_ml."
        ) from error
    return {organ: SizePrior.from_volumes(measured) for organ, measured in volumes.items()}
