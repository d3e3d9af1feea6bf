"""Hub of anchors: the leaves by which autograd knows all tables of a lookup.

Which of them a backward pass was asked for is a question to the engine for each. One leaf more,
that nobody can ask for, answers for all of a pass that was asked for none: those of all leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning.table.anchor import Anchor

_will_execute: Any = torch._C._will_engine_execute_node


class AnchorHub:
    """Leaves that stand for the anchors of some tables.

    Args:
        anchors: Of the tables; at least one requires a gradient.

    Attributes:
        joined: Float32 [0], made of the leaves: an input of a lookup's Function, which returns no
            gradient for it.
    """

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self._requires_grad = [anchor.requires_grad for anchor in anchors]
        trained: list[Any] = [anchor for anchor in anchors if anchor.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            spare = torch.empty(0, device=trained[0].device, requires_grad=True)
            # A Function takes 2 us to be given an input: one node reaches all leaves. It saves
            # nothing, so any number of passes may go through it.
            self.joined: Tensor = torch.cat([*trained, spare])
        edges: Any = self.joined.grad_fn
        *self._nodes, self._spare = (node for node, _ in edges.next_functions)

    def asked(self) -> list[bool]:
        """Return for each table whether the backward pass that runs adds up its gradients.

        ``torch.autograd.grad`` returns what it was asked for and adds up nothing, and ``backward``
        may be asked for the gradients of other leaves alone, or of some tables.
        """
        if _will_execute(self._spare):
            return self._requires_grad
        nodes = iter(self._nodes)
        return [is_trained and _adds_up(next(nodes)) for is_trained in self._requires_grad]


def _adds_up(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # torch.autograd.grad was asked for an anchor's
        return False


__all__ = ["AnchorHub"]
