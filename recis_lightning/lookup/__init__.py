"""One batch through a group of tables."""

from recis_lightning.lookup.early_gradients import overlap_backward
from recis_lightning.lookup.evaluation import finish_evaluation
from recis_lightning.lookup.gradient_exchange import send_gradients
from recis_lightning.lookup.lookahead import look_ahead
from recis_lightning.table.gradient_exchange import set_gradient_exchange

set_gradient_exchange(send_gradients)

__all__ = ["finish_evaluation", "look_ahead", "overlap_backward"]
