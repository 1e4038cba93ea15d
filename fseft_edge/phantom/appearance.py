"""The appearance of the anatomy in a CT: tissue values by contrast phase, blur, noise, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.runtime.errors import UsageError

ContrastPhase = Literal["native", "arterial", "portal"]

AIR_HU = -1000.0
_FWHM_PER_SIGMA = 2.3548

# Typical means of each tissue in HU. Unenhanced values follow the usual textbook ranges (liver 50-65, spleen 40-55,
# kidney 30-40, blood 35-45, muscle 45-60, fat -120 to -80); enhanced ones are typical of 120 kV abdominal protocols.
_UNENHANCED = {
    "fat": -102.0,
    "visceral_fat": -96.0,
    "muscle": 54.0,
    "lung": -850.0,
    "lung_vessel": -40.0,
    "cortical_bone": 620.0,
    "trabecular_bone": 190.0,
    "disc": 85.0,
    "marrow_canal": 25.0,
    "cartilage": 110.0,
    "fluid": 8.0,
    "bowel_wall": 42.0,
    "gas": -960.0,
    "liver": 58.0,
    "liver_vessel": 42.0,
    "lesion": 35.0,
    "spleen": 48.0,
    "renal_cortex": 33.0,
    "renal_medulla": 31.0,
    "aorta": 41.0,
    "vena_cava": 40.0,
    "heart": 43.0,
    "pancreas": 40.0,
    "gallbladder": 9.0,
}
_ENHANCED = {
    "arterial": {
        "muscle": 59.0,
        "liver": 74.0,
        "liver_vessel": 105.0,
        "lesion": 48.0,
        "spleen": 118.0,
        "renal_cortex": 190.0,
        "renal_medulla": 85.0,
        "aorta": 300.0,
        "vena_cava": 95.0,
        "heart": 210.0,
        "pancreas": 100.0,
        "bowel_wall": 80.0,
        "lung_vessel": 30.0,
    },
    "portal": {
        "muscle": 63.0,
        "liver": 112.0,
        "liver_vessel": 165.0,
        "lesion": 62.0,
        "spleen": 122.0,
        "renal_cortex": 190.0,
        "renal_medulla": 160.0,
        "aorta": 152.0,
        "vena_cava": 142.0,
        "heart": 140.0,
        "pancreas": 98.0,
        "bowel_wall": 90.0,
        "lung_vessel": 10.0,
    },
}


@dataclass(frozen=True)
class Site:
    """A scanner and its protocol: reconstruction kernel, dose, contrast phase and calibration.

    Attributes:
        kernel_fwhm_mm: full width at half maximum of the point spread function of the reconstruction, mm.
        noise_hu: standard deviation of the noise, HU.
        contrast_phase: phase of the intravenous contrast; "native" means without contrast.
        hu_offset: offset that is added to every value, HU.
        hu_scale: factor of every value, applied before the offset.
    """

    kernel_fwhm_mm: float = 2.5
    noise_hu: float = 12.0
    contrast_phase: ContrastPhase = "portal"
    hu_offset: float = 0.0
    hu_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.contrast_phase not in ("native", *_ENHANCED):
            raise UsageError(
                f"The contrast phase {self.contrast_phase!r} is unknown.",
                remedy="Set contrast_phase to 'native', 'arterial' or 'portal'.",
            )
        if self.kernel_fwhm_mm < 0 or self.noise_hu < 0:
            raise UsageError(
                f"kernel_fwhm_mm is {self.kernel_fwhm_mm} and noise_hu is {self.noise_hu}; neither may be negative.",
                remedy="Set kernel_fwhm_mm and noise_hu to 0 or more; 0 means no blur or no noise.",
            )

    def tissue_hu(self, enhancement: float = 1.0) -> dict[str, float]:
        """Return the mean HU of each tissue in the contrast phase of this site, before calibration.

        Args:
            enhancement: factor of the difference between enhanced and unenhanced HU, 1 on average.
        """
        enhanced = _ENHANCED.get(self.contrast_phase, {})
        return _UNENHANCED | {
            name: _UNENHANCED[name] + enhancement * (hu - _UNENHANCED[name]) for name, hu in enhanced.items()
        }


SITES: dict[str, Site] = {
    "reference": Site(),
    "native": Site(noise_hu=14.0, contrast_phase="native"),
    "arterial": Site(contrast_phase="arterial"),
    "shifted": Site(kernel_fwhm_mm=1.0, noise_hu=32.0, contrast_phase="arterial", hu_offset=18.0, hu_scale=1.04),
}


def reconstruct(
    hu: NDArray[np.float32], spacing: NDArray[np.float64], site: Site, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Return the image of a scanner, int16 HU `[X, Y, Z]`, computed from an ideal image.

    The noise is white noise blurred by the kernel, minus half of this noise after a wider blur, because filtered
    back-projection gives little noise at the lowest spatial frequencies.

    Args:
        hu: ideal image, HU `[X, Y, Z]`; overwritten.
        spacing: voxel spacing in mm, `[3]`.
        site: scanner and protocol.
        rng: generator for the noise.
    """
    sigma = site.kernel_fwhm_mm / _FWHM_PER_SIGMA / spacing
    if site.kernel_fwhm_mm > 0:
        ndimage.gaussian_filter(hu, sigma, output=hu, mode="nearest", truncate=3.0)
    if site.noise_hu > 0:
        white = rng.standard_normal(hu.shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(white, sigma, mode="wrap", truncate=3.0)
        noise -= np.float32(0.5) * ndimage.gaussian_filter(noise, 5.0 / spacing, mode="wrap", truncate=3.0)
        noise *= np.float32(site.noise_hu / max(float(noise.std()), 1e-6))
        hu += noise
    hu *= np.float32(site.hu_scale)
    hu += np.float32(site.hu_offset)
    np.rint(hu, out=hu)
    return np.clip(hu, -1024, 3071).astype(np.int16)
