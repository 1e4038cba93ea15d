"""What each of several training processes runs under ``torchrun``: a whole run, and one with a break.

torchrun --nproc-per-node 2 training_process.py PLAN DATA OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from fseft_edge.pretraining import open_processes, pretrain, read_pretraining_config

if __name__ == "__main__":
    plan, data, output = (Path(argument) for argument in sys.argv[1:])
    with open_processes("cpu") as processes:
        run = {"data_root": data, "processes": processes}
        pretrain(read_pretraining_config(plan), output=output / "straight", **run)
        pretrain(read_pretraining_config(plan), output=output / "broken", stop_after=2, **run)
        pretrain(read_pretraining_config(plan), output=output / "broken", resume=True, **run)
