"""Pre-training of an encoder on several partially annotated data sets (FSEFT, section on pre-training, eq. 1)."""

from fseft_edge.pretraining.plan import PretrainingPlan, read_plan
from fseft_edge.pretraining.processes import Processes, open_processes
from fseft_edge.pretraining.training import pretrain

__all__ = ["PretrainingPlan", "Processes", "open_processes", "pretrain", "read_plan"]
