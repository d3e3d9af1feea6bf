"""``StepInspector``: looks at every operator of a step as it runs, torch's and ours."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from recis_lightning.engine import EmbeddingEngine
from recis_lightning.monitoring.operator_bytes import bytes_of
from recis_lightning.monitoring.step_costs import ModuleCost, OperatorCost, StepCosts
from recis_lightning.ops import backend

__all__ = ["StepInspector"]

_CONTAINERS = ("recis::lookup", "recis::send_gradients")  # ops are within


@final
class StepInspector:
    """Inspector of what runs between ``start`` and ``stop``: each operator's bytes, FLOPs and time.

    It sees operators below autograd, on every thread of a backward pass, and calls them as they
    are: results stay the same to the bit. A backward operator belongs to the module in whose
    forward pass its autograd node was made. Beside a GPU each operator is waited for. What
    ``torch.compile`` has compiled is not seen.

    Args:
        model: The model; its submodules get their names from it.
        synchronize: Waits for the device; None: nothing to wait for.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> inspector = StepInspector(model)
        >>> inspector.start()
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> costs = inspector.stop(step=1)
        >>> [(cost.name, cost.forward_flops, cost.backward_flops) for cost in costs.modules]
        [('', 48, 48), ('0', 48, 48), ('1', 0, 0)]
    """

    def __init__(self, model: nn.Module, synchronize: Callable[[], None] | None = None) -> None:
        from torch.utils.flop_counter import flop_registry  # its import takes a while

        self.is_paused = False
        self._flops: Any = flop_registry
        self._synchronize = synchronize
        self._names = {module: name for name, module in model.named_modules()}
        self._root = model
        self._mode = _Mode(self._call)
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._costs: StepCosts | None = None
        self._thread = 0
        self._running: list[tuple[nn.Module, int]] = []  # forward passes, and first nodes
        self._spans: list[tuple[nn.Module, int, int]] = []  # of nodes
        self._ops: list[list[float]] = []  # start, and seconds of ops within
        self._handles: list[Any] = []
        self._modules: dict[nn.Module, list[float]] = defaultdict(lambda: [0.0] * 6)
        self._operators: dict[str, list[float]] = defaultdict(lambda: [0.0] * 3)

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.get_ident()
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        for engine in self._engines():
            vars(engine)["concat"] = partial(self._concat, engine)
        backend.add_meter(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, step: int) -> StepCosts:
        """Look no more, and return what was seen; later calls return it again."""
        if self._costs is not None:
            return self._costs
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        backend.remove_meter(self)
        for handle in self._handles:
            handle.remove()
        for engine in self._engines():
            vars(engine).pop("concat", None)
        modules = []
        for module, name in self._names.items():
            if module in self._modules:
                forward, backward, forward_s, backward_s, table_s, size = self._modules[module]
                modules.append(
                    ModuleCost(
                        name,
                        type(module).__name__,
                        forward_flops=int(forward),
                        backward_flops=int(backward),
                        forward_ms=1e3 * forward_s,
                        backward_ms=1e3 * backward_s,
                        table_ms=1e3 * table_s,
                        table_bytes=int(size),
                    )
                )
        operators = [
            OperatorCost(name, int(calls), int(size), 1e3 * seconds)
            for name, (calls, size, seconds) in self._operators.items()
        ]
        self._costs = StepCosts(step, modules, sorted(operators, key=lambda cost: -cost.ms))
        return self._costs

    def begin_op(self, name: str) -> None:
        """Note that an op of ours begins."""
        if self._is_mine() and name not in _CONTAINERS:
            self._ops.append([self._now(), 0.0])

    def end_op(self, name: str, num_bytes: int) -> None:
        """Note that an op of ours ends; what ops within it took is not its own."""
        if not self._is_mine() or name in _CONTAINERS or not self._ops:
            return
        start, within = self._ops.pop()
        spent = self._now() - start
        if self._ops:
            self._ops[-1][1] += spent
        if self.is_paused:
            return
        self._note(name, num_bytes, spent - within)
        for module in self._owners():
            cost = self._modules[module]
            cost[4] += spent - within
            cost[5] += num_bytes

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, and note it unless it is a part of an op of ours."""
        is_within = self._is_mine() and bool(self._ops)
        if self.is_paused or is_within or func.namespace == "profiler":
            return func(*args, **kwargs)
        start = self._now()
        out = func(*args, **kwargs)
        spent = self._now() - start
        flops = 0
        if func.overloadpacket in self._flops:
            flops = self._flops[func.overloadpacket](*args, **kwargs, out_val=out)
        is_backward = torch._C._current_graph_task_id() != -1
        with self._lock:
            self._note(func._schema.name, bytes_of(func, args, kwargs, out), spent)
            for module in self._owners():
                cost = self._modules[module]
                cost[int(is_backward)] += flops
                cost[2 + int(is_backward)] += spent
        return out

    def _note(self, name: str, num_bytes: int, seconds: float) -> None:
        total = self._operators[name]
        total[0] += 1
        total[1] += num_bytes
        total[2] += seconds

    def _owners(self) -> set[nn.Module]:
        """Return the modules that what runs now belongs to."""
        owners = {module for module, _ in self._running} if self._is_mine() else set()
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            owners |= {module for module, low, high in self._spans if low <= number < high}
        if owners or node is not None:
            owners.add(self._root)
        return owners

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._is_mine() and module in self._names:
            self._running.append((module, torch._C._autograd._get_sequence_nr()))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._is_mine() and self._running and self._running[-1][0] is module:
            _, first = self._running.pop()
            self._spans.append((module, first, torch._C._autograd._get_sequence_nr()))

    def _engines(self) -> list[EmbeddingEngine]:
        return [module for module in self._names if isinstance(module, EmbeddingEngine)]

    def _concat(self, engine: EmbeddingEngine, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call an engine by ``concat``, which no hook of torch sees, as by ``forward``."""
        self._enter(engine, args)
        try:
            return type(engine).concat(engine, *args, **kwargs)
        finally:
            self._leave(engine, args, None)

    def _is_mine(self) -> bool:
        return self._thread == threading.get_ident()

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


@final
class _Mode(TorchDispatchMode):
    """Mode that calls a function in place of each operator."""

    def __init__(self, call: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(func, args, kwargs or {})
