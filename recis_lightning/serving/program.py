"""Program of a served model: the graph of ``torch.export`` as primitives, and its interpreter.

torch's own format is unpickled and has expressions that are evaluated: to load a file of it may run
anything. Here a program is a list of calls of torch's operators by name, none of which reaches
outside the tensors that it is given, and it loads without torch's compiler.
"""

from __future__ import annotations

import copy
import math
import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning.lookup.named_tables import RowReader
from recis_lightning.lookup.operator import RecordedFeature, features_of
from recis_lightning.serving.values import DTYPES

_CPU = torch.device("cpu")
_LOOK_UP = "recis_lightning::look_up"
_METADATA = torch.ops.aten._assert_tensor_metadata.default
# Arithmetic of sizes, which torch.export leaves as Python's own functions.
_PYTHON = {
    f"python::{name}": getattr(python_operator, name)
    for name in (
        *("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
    )
} | {
    f"torch::{name}": getattr(torch, name)
    for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")
}
_NAMES_OF_PYTHON = {function: name for name, function in _PYTHON.items()}
# Operators that read files, uninitialised memory or memory by offsets, or change what a tensor is.
_REFUSED = ("from_file", "set", "set_", "set_data", "resize", "resize_", "resize_as_", "empty")
_REFUSED_PREFIXES = ("_", "as_strided", "empty_", "new_empty", "record_stream", "unsafe_", "sym_")
_ALLOWED = (
    *("_softmax", "_log_softmax", "_to_copy", "_assert_scalar"),
    *("sym_size", "sym_numel", "sym_stride"),
)
_KINDS = {
    "dtype": {name: dtype for name, dtype in DTYPES.items()},
    "layout": {"strided": torch.strided},
    "memory_format": {
        "contiguous_format": torch.contiguous_format,
        "preserve_format": torch.preserve_format,
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}


def _to_dtype(tensor: Tensor, dtype: torch.dtype, *more: Any, **named: Any) -> Tensor:
    """Return ``aten::to``'s tensor; the one that was given, where that has the dtype."""
    if tensor.dtype is dtype and not more and not named:
        return tensor
    return torch.ops.aten.to.dtype(tensor, dtype, *more, **named)  # type: ignore[no-any-return]


def _reshape(tensor: Tensor, shape: list[int]) -> Tensor:
    """Return ``aten::reshape``'s tensor; the one that was given, where that has the shape."""
    if shape == [-1, *tensor.shape[1:]] and tensor.dim() and 0 not in shape:
        return tensor
    return torch.ops.aten.reshape.default(tensor, shape)  # type: ignore[no-any-return]


# Calls that recorded programs have before each lookup, and which mostly do nothing. Those of torch
# release the interpreter's lock, for which other requests wait.
_QUICK: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.to.dtype: _to_dtype,
    torch.ops.aten.reshape.default: _reshape,
}


def without_dead_calls(graph: torch.fx.Graph) -> torch.fx.Graph:
    """Return a copy of a graph without calls whose results nobody uses.

    Assertions of dtypes count as no use: ids of int32 and int64 are both served.
    """
    kept = copy.deepcopy(graph)
    for node in list(kept.nodes):
        if node.target is _METADATA:
            kept.erase_node(node)
    kept.eliminate_dead_code()
    return kept


def encode(graph: torch.fx.Graph, given: Mapping[str, int | str]) -> dict[str, Any]:
    """Return a graph as primitives.

    Args:
        graph: Of an ``ExportedProgram``, from ``without_dead_calls``.
        given: Placeholder -> position of the input, or name of the constant, that it stands for;
            those that are missing have no use.

    Returns:
        ``{"inputs": [...], "calls": [...], "outputs": [...]}``: values are numbered, inputs first.

    Raises:
        ValueError: The graph calls what a served program may not (names it).
    """
    numbers: dict[torch.fx.Node, int] = {}
    inputs: list[int | str] = []
    calls: list[list[Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in given:
            numbers[node] = len(inputs)
            inputs.append(given[node.name])
    for node in graph.nodes:
        if node.op == "call_function":
            name = _name_of(node.target)
            _check_mutation(node, given)
            arguments = [_encode(arg, numbers) for arg in node.args]
            by_name = {key: _encode(arg, numbers) for key, arg in node.kwargs.items()}
            numbers[node] = len(inputs) + len(calls)
            calls.append([name, arguments, by_name])
        elif node.op not in ("placeholder", "output"):
            raise ValueError(
                f"the model's program has {node.op} {node.target}, which is not served"
            )
    returned: Any = graph.output_node().args[0]
    return {
        "inputs": inputs,
        "calls": calls,
        "outputs": [_encode(value, numbers) for value in returned],
    }


def _check_mutation(node: torch.fx.Node, given: Mapping[str, int | str]) -> None:
    """Raise ValueError if a call changes a parameter or buffer, which threads share."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for value, argument in zip(node.args, schema.arguments, strict=False):
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if (
            is_changed
            and isinstance(value, torch.fx.Node)
            and isinstance(given.get(value.name), str)
        ):
            raise ValueError(
                f"the model's forward changes {given[value.name]} in evaluation, by {node.target}; "
                "a served model only reads"
            )


def _name_of(target: Any) -> str:
    if target in _NAMES_OF_PYTHON:
        return _NAMES_OF_PYTHON[target]
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}::{target._schema.name.split('::')[1]}"
        name = name if name == _LOOK_UP else f"{name}.{target._overloadname}"
        _function(name)
        return name
    raise ValueError(f"the model's forward calls {target}, which a served program cannot")


def _encode(value: Any, numbers: Mapping[torch.fx.Node, int]) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"value": numbers[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(part, numbers) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        if value.type not in ("cpu", "cuda"):
            raise ValueError(f"the model's forward names the device {value}")
        return {"device": True}
    for kind, names in _KINDS.items():
        for name, known in names.items():
            if type(value) is type(known) and value == known:
                return {kind: name}
    raise ValueError(f"the model's program has the constant {value!r}, which is not served")


def _function(name: Any) -> Callable[..., Any]:
    """Return what a call names; ValueError if a served program may not call it."""
    if not isinstance(name, str):
        raise ValueError(f"the program calls {name!r}, which is no name")
    if name in _PYTHON:
        python: Callable[..., Any] = _PYTHON[name]
        return python
    if name.startswith("aten::") and name.count(".") == 1:
        base, _, overload = name.removeprefix("aten::").partition(".")
        is_refused = base in _REFUSED or base.startswith(_REFUSED_PREFIXES)
        if base.isidentifier() and overload.isidentifier() and (base in _ALLOWED or not is_refused):
            found = getattr(getattr(torch.ops.aten, base, None), overload, None)
            if isinstance(found, torch._ops.OpOverload):
                return _QUICK.get(found, found)
    if name == _LOOK_UP:
        return features_of
    raise ValueError(f"the program calls {name!r}, which a served program may not")


class Program:
    """Program that was read, ready to run on any number of threads.

    Args:
        state: From ``encode``, as JSON gave it back.
        num_inputs: Number of tensors that ``run`` is given.
        constants: Weights and buffers.
        tables: Tables by name; they look up on the CPU.
        device: Where all else is computed, and where constants are.

    Raises:
        ValueError: It is damaged, or calls what it may not.
    """

    def __init__(
        self,
        state: Any,
        num_inputs: int,
        constants: Mapping[str, Tensor],
        tables: Mapping[str, RowReader],
        device: torch.device = _CPU,
    ) -> None:
        if not isinstance(state, dict) or set(state) != {"inputs", "calls", "outputs"}:
            raise ValueError("the program is damaged")
        if not all(isinstance(part, list) for part in state.values()):
            raise ValueError("the program is damaged")
        self._tables, self._device = tables, device
        self._start: list[int | Tensor] = []
        for given in state["inputs"]:
            if isinstance(given, str) and given in constants:
                self._start.append(constants[given])
            elif type(given) is int and 0 <= given < num_inputs:
                self._start.append(given)
            else:
                raise ValueError(f"the program takes {given!r}, which there is not")
        self._calls = []
        known = len(self._start)
        for call in state["calls"]:
            if not isinstance(call, list) or len(call) != 3 or not isinstance(call[2], dict):
                raise ValueError("the program is damaged")
            name, arguments, by_name = call
            function = _function(name)
            decoded = _decode(arguments, known, device)
            named = {key: _decode(value, known, device) for key, value in by_name.items()}
            if function is features_of:
                self._check_lookup(decoded, named)
                decoded = _features(decoded)
            self._calls.append((function, decoded, named))
            known += 1
        self._outputs = _decode(state["outputs"], known, device)
        self._frees = self._last_uses(known)

    @property
    def num_outputs(self) -> int:
        """Number of values that ``run`` returns."""
        return len(self._outputs)

    def _check_lookup(self, arguments: Any, by_name: Any) -> None:
        """Raise ValueError unless a lookup fits its tables."""
        lists = arguments[3:] if isinstance(arguments, list) else []
        if by_name or len(lists) != 8 or not all(isinstance(part, list) for part in lists):
            raise ValueError("the program has a damaged lookup")
        tables, dims, dtypes, modes, tile_lens, padding, *flags = lists
        if len(set(map(len, lists))) != 1:
            raise ValueError("the program has a damaged lookup")
        for name, dim, dtype, mode, tile_len, pad in zip(
            tables, dims, dtypes, modes, tile_lens, padding, strict=True
        ):
            table = self._tables.get(name) if isinstance(name, str) else None
            if table is None or (dim, DTYPES.get(dtype)) != (table.embedding_dim, table.dtype):
                raise ValueError(f"the program looks up {dim} x {dtype} of table {name!r}")
            if mode not in ("none", "sum", "mean", "mean_by_count", "tile"):
                raise ValueError(f"the program has a lookup of mode {mode!r}")
            is_padding = isinstance(pad, str) and (not pad or pad.lstrip("-").isdecimal())
            if type(tile_len) is not int or not 0 <= tile_len < 1 << 20 or not is_padding:
                raise ValueError("the program has a damaged lookup")
        if not all(isinstance(flag, bool) for part in flags for flag in part):
            raise ValueError("the program has a damaged lookup")

    def _last_uses(self, known: int) -> list[list[int]]:
        """Return the values that no call after each one needs."""
        frees: list[list[int]] = [[] for _ in self._calls]
        kept = _values_in(self._outputs)
        for i in range(len(self._calls) - 1, -1, -1):
            used = _values_in(self._calls[i][1:]) - kept
            frees[i] = sorted(used)
            kept |= used
        return frees

    def run(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Return the program's outputs."""
        values: list[Any] = [
            inputs[given] if isinstance(given, int) else given for given in self._start
        ]
        with torch.no_grad():
            for (function, arguments, by_name), done in zip(self._calls, self._frees, strict=True):
                if function is features_of:
                    values.append([self._look_up(feature, values) for feature in arguments])
                else:
                    args = [_resolve(argument, values) for argument in arguments]
                    named = {key: _resolve(argument, values) for key, argument in by_name.items()}
                    values.append(function(*args, **named))
                for number in done:
                    values[number] = None
            return [_resolve(output, values) for output in self._outputs]

    def _look_up(self, feature: RecordedFeature, values: Sequence[Any]) -> Tensor:
        """Look a feature up, of which ids, offsets and weights are numbers of values."""
        found = self._tables[feature.table].look_up(
            _on_host(feature.ids, values),
            None if feature.offsets is None else _on_host(feature.offsets, values),
            None if feature.weights is None else _on_host(feature.weights, values),
            *(feature.mode, feature.tile_len, feature.padding_idx),
        )
        return found if self._device.type == "cpu" else found.to(self._device)

    def with_values(
        self, given: Sequence[Any], constants: Mapping[str, Tensor], tables: Mapping[str, RowReader]
    ) -> Program:
        """Return the same program over other tables, and other values of some constants.

        Args:
            given: "inputs" of the program's state.
            constants: The new values, by name; the others stay.
            tables: As they were checked: of the same names, dims and dtypes.
        """
        other = Program.__new__(Program)
        other.__dict__.update(self.__dict__)
        other._tables = tables
        other._start = [
            constants.get(name, value) if isinstance(name, str) else value
            for name, value in zip(given, self._start, strict=True)
        ]
        return other


class _Value(int):
    """Number of a value among those of a run."""


def _on_host(number: Any, values: Sequence[Any]) -> Tensor:
    tensor: Tensor = values[number]
    return tensor if tensor.is_cpu else tensor.cpu()


def _features(arguments: list[Any]) -> list[RecordedFeature]:
    """Return the features of a lookup with the numbers of values in place of tensors."""
    try:
        features = features_of(*arguments)
    except (IndexError, StopIteration, TypeError, ValueError):
        raise ValueError("the program has a damaged lookup") from None
    given = [number for one in features for number in (one.offsets, one.weights)]
    numbers = [one.ids for one in features] + [one for one in given if one is not None]
    if not all(isinstance(number, _Value) for number in numbers):
        raise ValueError("the program has a damaged lookup")
    return features


def _decode(value: Any, known: int, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(part, known, device) for part in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((kind, content),) = value.items()
            if kind == "value" and type(content) is int and 0 <= content < known:
                return _Value(content)
            if kind == "device":
                return device
            if isinstance(content, str) and content in _KINDS.get(kind, {}):
                return _KINDS[kind][content]
        raise ValueError("the program is damaged")
    return value


def _resolve(argument: Any, values: Sequence[Any]) -> Any:
    kind = type(argument)
    if kind is _Value:
        return values[argument]
    if kind is list:
        return [_resolve(part, values) for part in argument]
    return argument


def _values_in(argument: Any) -> set[int]:
    if isinstance(argument, _Value):
        return {int(argument)}
    if isinstance(argument, dict):
        argument = list(argument.values())
    if isinstance(argument, (list, tuple)):
        return set().union(*map(_values_in, argument))
    return set()


__all__ = ["Program", "encode", "without_dead_calls"]
