"""``ClipGradNormHook``: one norm over the gradients of dense parameters and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.hook import Hook
from recis_lightning.optim.clipping import check_clipping, clip_grad_norm_

__all__ = ["ClipGradNormHook"]


@explain_arguments()
@final
class ClipGradNormHook(Hook):
    """Clip the norm of all gradients together, dense and sparse, before each optimizer step.

    The norm and the result are those of ``torch.nn.utils.clip_grad_norm_`` over the same model with
    ``nn.Embedding``, over all ranks. ``Trainer(gradient_clip_val)`` clips dense parameters alone.
    The norm before clipping is logged as ``"grad_norm"`` at each step, by ``self.log``. With
    accumulated batches, it is the norm of their joint gradient.

    In manual optimization the hook cannot know when the last backward pass was: call
    ``clip_gradients`` with all optimizers that step next. ``recis_lightning.optim.clip_grad_norm_``
    does the same in a loop written by hand. A sparse optimizer's own ``clip_grad_norm`` bounds what
    this hook leaves.

    Args:
        max_norm: Bound of the norm; ``inf`` only logs it.
        norm_type: The p of the p-norm; ``inf`` for the largest element. Tables on a GPU have 2
            only, and other norms than 2 are much slower.
        error_if_nonfinite: Raise if the norm is NaN or infinite; on a GPU, the host then waits.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A number is out of range.

    Example:
        >>> ClipGradNormHook(max_norm=1.0).norm_type
        2.0
    """

    log: Callable[..., None]  # the module's; Lightning gives it to all callbacks

    def __init__(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> None:
        super().__init__()
        check_clipping(max_norm, norm_type, error_if_nonfinite)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.error_if_nonfinite = error_if_nonfinite
        self._logs = False  # a Trainer that logs trains
        self._was_called = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a Trainer that clips too.

        Raises:
            MisconfigurationException: The Trainer has ``gradient_clip_val``.
        """
        if stage == "fit" and trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"ClipGradNormHook({self.max_norm}) and "
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would both clip: remove "
                "gradient_clip_val, which clips dense parameters alone"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logs, self._was_called = not trainer.barebones, False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logs = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._logs = False

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.automatic_optimization:
            self.clip_gradients(optimizer)
        elif not self._was_called:
            self._was_called = True
            rank_zero_warn(
                "ClipGradNormHook clips nothing by itself in manual optimization: call its "
                "clip_gradients(optimizers) after the last backward pass of a step"
            )

    def clip_gradients(self, *optimizers: Any) -> Tensor:
        """Clip the gradients of optimizers together, and log the norm.

        Args:
            *optimizers: All that step next; ``self.optimizers()`` of a LightningModule too.

        Returns:
            float32 [], the norm before clipping.

        Raises:
            RuntimeError: As ``recis_lightning.optim.clip_grad_norm_``.
            TypeError: One is no optimizer.
        """
        self._was_called = True
        given = [part for each in optimizers for part in (each if _is_list(each) else [each])]
        norm = clip_grad_norm_(given, self.max_norm, self.norm_type, self.error_if_nonfinite)
        if self._logs:
            self.log("grad_norm", norm, on_step=True, on_epoch=False)
        return norm


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
