"""Pre-training of an encoder on several partially annotated data sets (FSEFT, pre-training section, equation 1)."""

from fseft_edge.pretraining.config import PretrainingConfig, read_pretraining_config
from fseft_edge.pretraining.processes import Processes, open_processes
from fseft_edge.pretraining.training import pretrain

__all__ = ["PretrainingConfig", "Processes", "open_processes", "pretrain", "read_pretraining_config"]
