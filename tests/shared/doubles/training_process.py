"""Script of each training process under ``torchrun``: a whole run, and a run with an interruption.

torchrun --nproc-per-node 2 training_process.py CONFIG DATA OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from fseft_edge.pretraining import open_processes, pretrain, read_pretraining_config

if __name__ == "__main__":
    path, data, output = (Path(argument) for argument in sys.argv[1:])
    with open_processes("cpu") as processes:
        run = {"data_root": data, "processes": processes}
        pretrain(read_pretraining_config(path), output=output / "straight", **run)
        pretrain(read_pretraining_config(path), output=output / "broken", stop_after=1, **run)
        pretrain(read_pretraining_config(path), output=output / "broken", resume=True, **run)
