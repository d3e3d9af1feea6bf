"""Optimizers of tables, and one for Lightning that joins a dense and sparse ones."""

from recis_lightning.optim.adagrad import SparseAdagrad, SparseRowwiseAdagrad
from recis_lightning.optim.adam import SparseAdam, SparseAdamW, SparseRowwiseAdam
from recis_lightning.optim.adam_ar import SparseAdamAR
from recis_lightning.optim.clipping import clip_grad_norm_
from recis_lightning.optim.ftrl import SparseFTRL
from recis_lightning.optim.lion import SparseLion
from recis_lightning.optim.rmsprop import SparseRMSprop
from recis_lightning.optim.sgd import SparseSGD
from recis_lightning.optim.sparse_dense import SparseDenseOptimizer
from recis_lightning.optim.sparse_optimizer import SparseOptimizer

__all__ = [
    "SparseAdagrad",
    "SparseAdam",
    "SparseAdamAR",
    "SparseAdamW",
    "SparseDenseOptimizer",
    "SparseFTRL",
    "SparseLion",
    "SparseOptimizer",
    "SparseRMSprop",
    "SparseRowwiseAdagrad",
    "SparseRowwiseAdam",
    "SparseSGD",
    "clip_grad_norm_",
]
