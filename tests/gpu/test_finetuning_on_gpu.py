"""Fine-tuning on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.tuning_site import FOR_A_UNET, tuning_site

from fseft_edge.finetuning.settings import TuningMethod, TuningSettings
from fseft_edge.runtime.system.progress import SilentProgress


@pytest.mark.gpu
@pytest.mark.parametrize("method", FOR_A_UNET)
def test_an_encoder_is_fine_tuned_on_the_gpu(tmp_path: Path, method: TuningMethod) -> None:
    """The encoder's head contains one of the organs, so that its classifier starts from weights on the CPU."""
    support = tuning_site(tmp_path).support()
    assert support.rows[0] is not None
    decoder = None if method == "full" else "tuned"
    settings = TuningSettings(method, decoder, steps=40, crop=32, rate=1e-2, device=torch.device("cuda", 0))
    tuned = support.tuned(settings, [0, 1], SilentProgress())
    assert tuned.losses[-1] < 0.9 * tuned.losses[0]
    assert {value.device.type for value in tuned.network.state_dict().values()} == {"cpu"}
