"""What ranks import before the first check, for all of them at once where they are forked."""

import gc

import lightning  # noqa: F401 - most checks run a Trainer

# Its functions keep the process group that there is when it is imported, as Dynamo imports it.
import torch.distributed.nn  # noqa: F401

import tests.helpers.rank_training  # noqa: F401
from tests.helpers.interpreting import quicken_interpreter

quicken_interpreter()

# A group of a new model looks for its LightningModule in the whole heap, unless that is set aside.
gc.collect()
gc.freeze()
