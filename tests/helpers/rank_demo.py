"""What ranks run in the test of the example under ``exchange_dtype``."""

from functools import partial
from unittest.mock import patch

import torch
from torch import distributed

from examples.deepfm import model as demo
from examples.deepfm import train
from recis_lightning import EmbeddingEngine
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.rank_trainers import as_torchrun


def demo_auc(path, data, exchange_dtype):
    """Return the test AUC of the DeepFM example on MovieLens."""
    engine = partial(EmbeddingEngine, exchange_dtype=exchange_dtype)
    torch.manual_seed(0)
    with as_torchrun() as settings, patch.object(demo, "EmbeddingEngine", engine):
        model = train.movielens_model()
        clicks = train.movielens_data(data, ranks=distributed.get_world_size())
        run = quiet_trainer(path, **{**settings, "max_epochs": 2})
        run.fit(model, clicks)
        (tested,) = run.test(model, clicks, verbose=False)
    return tested["test_auc"]
