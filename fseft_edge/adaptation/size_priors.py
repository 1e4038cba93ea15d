"""Size priors of organs: from the volumes of the support set, from a table of volumes, or from the user."""

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

_MIN_GAMMA = 0.3
_DEFAULT_GAMMA = 0.5
_MIN_VOLUMES_FOR_SPREAD = 3
_MIN_VOLUMES_FOR_OUTLIERS = 5


@dataclass(frozen=True)
class SizePrior:
    """The range of sizes that is expected for an organ, in ml.

    Raises:
        UsageError: the range is empty, negative or not finite.
    """

    low_ml: float
    high_ml: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high_ml) and 0 <= self.low_ml <= self.high_ml and self.high_ml > 0):
            raise UsageError(
                f"The size prior from {self.low_ml:g} to {self.high_ml:g} ml is not a valid range.",
                remedy="Give the smaller volume first, and a larger volume above zero, for example liver=1200..1800ml.",
            )

    @classmethod
    def from_volumes(cls, volumes_ml: Sequence[float], gamma: float | None = None) -> SizePrior:
        """Return the prior from ``(1 - γ)`` to ``(1 + γ)`` times the mean volume.

        If there are five or more volumes, the mean excludes volumes that differ from the median by more than one
        standard deviation.

        Args:
            volumes_ml: volumes of the organ in several patients, in ml.
            gamma: ``γ``. None means twice the relative standard deviation of the volumes, but at least 0.3 (the value
                of the paper). With fewer than three volumes, None means 0.5. A narrow prior would be wrong for an organ
                whose size varies strongly between patients.

        Raises:
            UsageError: the list of volumes is empty.
        """
        if not volumes_ml:
            raise UsageError(
                "A size prior needs at least one volume, but there is none.",
                remedy="Give the range of sizes with --size-prior, for example --size-prior liver=1200..1800ml.",
            )
        volumes = np.asarray(volumes_ml, np.float64)
        if gamma is None:
            gamma = _spread(volumes)
        if len(volumes) >= _MIN_VOLUMES_FOR_OUTLIERS:
            # At least one volume is always within one standard deviation of the median. The factor allows for rounding.
            volumes = volumes[np.abs(volumes - np.median(volumes)) <= volumes.std() * (1 + 1e-9)]
        mean = float(volumes.mean())
        return cls(max(0.0, 1 - gamma) * mean, (1 + gamma) * mean)


def _spread(volumes: NDArray[np.float64]) -> float:
    if len(volumes) < _MIN_VOLUMES_FOR_SPREAD:
        return _DEFAULT_GAMMA
    return max(_MIN_GAMMA, 2 * float(volumes.std(ddof=1) / max(volumes.mean(), 1e-9)))


_PRIOR = re.compile(r"(?P<organ>[A-Za-z0-9_-]+)=(?P<low>[0-9.]+)\.\.(?P<high>[0-9.]+)(?:ml)?")


def parse_size_priors(values: Iterable[str]) -> dict[str, SizePrior]:
    """Return the priors from the values of the option ``--size-prior``, ``NAME=LOW..HIGHml``.

    Raises:
        UsageError: a value does not have this form, is not a valid range, or is the second value for an organ.
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
                f"The value {value!r} of --size-prior does not have the form NAME=LOW..HIGHml.",
                remedy="Write the size prior as in this example: --size-prior liver=1200..1800ml.",
            )
        if match["organ"] in priors:
            raise UsageError(
                f"--size-prior is given more than once for the organ {match['organ']}.",
                remedy="Give --size-prior at most once for each organ.",
            )
        priors[match["organ"]] = SizePrior(low, high)
    return priors


def read_size_priors(path: Path) -> dict[str, SizePrior]:
    """Return the priors from a table of volumes: CSV with the columns ``organ`` and ``volume_ml``, one volume per row.

    Raises:
        UnreadableFileError: the file is missing, a column is missing, or a volume is not a positive number.
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
            f"{path} is not a valid table of organ volumes.",
            remedy="Give a CSV file with the columns organ and volume_ml, and volumes above zero in ml.",
        ) from error
    return {organ: SizePrior.from_volumes(measured) for organ, measured in volumes.items()}
