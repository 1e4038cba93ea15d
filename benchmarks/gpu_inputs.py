"""Write what `gpu_day.py` measures with: an adapter for the organs of an encoder, or SwinUNETR-48 with random weights.

python benchmarks/gpu_inputs.py adapter edge_base.encoder zero_shot.adapter
python benchmarks/gpu_inputs.py swin_unetr FOLDER          writes FOLDER/random.encoder
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder_backends import write_bundle

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.adapters.file import write_adapter
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.scans.organs import OrganLabel


def main() -> None:
    """Write one input."""
    kind, *paths = sys.argv[1:]
    if kind == "adapter":
        bundle = EncoderBundle.open(Path(paths[0]))
        organs = [OrganLabel(name, number) for number, name in enumerate(bundle.manifest.organs, start=1)]
        write_adapter(Path(paths[1]), zero_shot_adapter(bundle, organs))
    elif kind == "swin_unetr":
        write_bundle(Path(paths[0]), kind, (96, 96, 96))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
