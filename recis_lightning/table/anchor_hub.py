"""Hub of anchors: one leaf by which autograd knows all tables of a lookup.

An edge to each anchor in every lookup costs a microsecond or two a table. A hub has these edges
once, and a lookup one to the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning.table.anchor import Anchor

_will_execute: Any = torch._C._will_engine_execute_node


class AnchorHub:
    """Leaf that stands for the anchors of some tables.

    Args:
        anchors: Of the tables; at least one requires a gradient.

    Attributes:
        leaf: Float32 [0], an input of a lookup's Function, which returns no gradient for it.
    """

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self._requires_grad = [anchor.requires_grad for anchor in anchors]
        trained: list[Any] = [anchor for anchor in anchors if anchor.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            # What is concatenated is saved nowhere: any number of passes may go through.
            joined = torch.cat(trained) if len(trained) > 1 else trained[0].view_as(trained[0])
        edges: Any = joined.grad_fn
        self._nodes: list[Any] = [node for node, _ in edges.next_functions]
        self.leaf: Tensor = joined if len(trained) > 1 else trained[0]

    def asked(self) -> list[bool]:
        """Return for each table whether the backward pass that runs adds up its gradients.

        ``torch.autograd.grad`` returns what it was asked for and adds up nothing, and ``backward``
        may be asked for the gradients of other leaves alone, or of some tables.
        """
        if _will_execute(_nowhere()):  # it was asked for nothing: those of all leaves
            return self._requires_grad
        nodes = iter(self._nodes)
        return [is_trained and _adds_up(next(nodes)) for is_trained in self._requires_grad]


def _adds_up(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # torch.autograd.grad was asked for an anchor's
        return False


_unused: list[Any] = []


def _nowhere() -> Any:
    """Return the node of a leaf that no graph has: a pass executes it if it was asked for none."""
    if not _unused:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.empty(0, requires_grad=True, device="cpu")
            view: Any = leaf.view_as(leaf)
            _unused.append(view.grad_fn.next_functions[0][0])
    return _unused[0]


__all__ = ["AnchorHub"]
