"""Recording of a model's forward pass, and of what makes its batches, as programs.

``torch.export`` follows tensors alone. So a function of dicts, tuples and ``Jagged`` is recorded as
one of the tensors in them, and their specs (``serving.values``) say where each belongs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recis_lightning.serving.data_dependence import explain_dependence
from recis_lightning.serving.program import encode, without_dead_calls
from recis_lightning.serving.values import (
    RAGGED,
    TensorSpec,
    flatten,
    is_of_sizes,
    num_samples,
    unequal,
    unflatten,
    without_unused,
)
from recis_lightning.table.listing import hash_tables

_LIFTED = "constants."  # prefix of tensors that are no parameters or buffers
CONVERTED = "transforms."  # prefix of the constants of a batch's conversion


class Recording(NamedTuple):
    """Program of a function, and what it takes and returns.

    Attributes:
        specs: Name and spec of each argument.
        inputs: Descriptions of the tensors that the program takes.
        numbers: Position of each of them among the tensors of the arguments -> its number.
        outputs: Spec of what it returns.
        program: From ``program.encode``.
        constants: Parameters and buffers that it reads.
    """

    specs: list[list[Any]]
    inputs: list[TensorSpec]
    numbers: dict[int, int]
    outputs: dict[str, Any]
    program: dict[str, Any]
    constants: dict[str, Tensor]


class _Flat(nn.Module):
    """Function that takes and returns tensors alone.

    Args:
        model: The function, a module if it has parameters.
        specs: Of its arguments.
        note: Is given the spec of what it returns.
        wanted: Positions of the tensors to return, among those that it returns; None: all.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        specs: list[dict[str, Any]],
        note: Callable[[dict[str, Any]], None],
        wanted: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.model, self._specs, self._note, self._wanted = model, specs, note, wanted

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Call the function; note the spec of what it returns."""
        found: list[Tensor] = []
        try:
            returned = self.model(*(unflatten(spec, tensors) for spec in self._specs))
        except RuntimeError as error:
            # Here already: torch would print all that it recorded.
            if (explained := explain_dependence(error, self.model)) is not None:
                raise explained from None
            raise
        self._note(flatten(returned, "output", found))
        return found if self._wanted is None else [found[position] for position in self._wanted]


def record_model(model: nn.Module, arguments: Sequence[Any]) -> Recording:
    """Record a model's forward pass.

    Args:
        model: In evaluation.
        arguments: Of its forward, an example.

    Raises:
        TypeError, ValueError: It does not take the arguments, or its forward does what a served
            program cannot (says what).
    """
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"example: {type(model).__name__}.forward does not take its {len(arguments)} "
            f"argument(s): {error}; a tuple stands for several"
        ) from None
    names = _argument_names(model, len(arguments))
    specs, tensors = _specs_of(names, arguments)
    try:
        with _without_anchors(model):
            return _record(model, names, arguments, None, "")
    except KeyError as error:
        raise explain_missing(error, "the model's forward", arguments) from error
    except RuntimeError as error:
        sizes = num_samples(zip(names, specs, strict=True), tensors)
        if is_of_sizes(error, sizes):
            raise ValueError(f"example: {unequal(sizes)}: {error}") from error
        raise


def record_conversion(
    convert: Callable[[dict[str, Any]], Any], entries: Mapping[str, Any], wanted: Sequence[int]
) -> Recording:
    """Record what makes a model's arguments of a batch's entries.

    Args:
        convert: Returns the arguments: one, or several in a tuple.
        entries: Name -> Tensor or ``Jagged``, an example.
        wanted: Positions of the tensors of the arguments that the model uses.

    Raises:
        TypeError, ValueError: ``convert`` does what a served program cannot (says what).
    """
    return _record(
        lambda given: as_arguments(convert(given)), ["entries"], [dict(entries)], wanted, CONVERTED
    )


def as_arguments(example: Any) -> tuple[Any, ...]:
    """Return the arguments of a forward pass: a tuple or list (no ``Jagged``) holds several."""
    return tuple(example) if type(example) in (tuple, list) else (example,)


def _record(
    function: Callable[..., Any],
    names: Sequence[str],
    arguments: Sequence[Any],
    wanted: Sequence[int] | None,
    prefix: str,
) -> Recording:
    specs, tensors = _specs_of(names, arguments)
    places = list[str]()
    for name, spec in zip(names, specs, strict=True):
        _name_tensors(spec, name, places)
    if not tensors:
        raise ValueError("example: expected tensors, got none")
    outputs: list[dict[str, Any]] = []
    flat = _Flat(function, specs, outputs.append, wanted)
    # Tensors apart from one another: torch would take one that occurs twice for one input.
    given = tuple(tensor.detach().clone() for tensor in tensors)
    auto = torch.export.Dim.AUTO
    # Of size 0 or 1 torch makes a constant in any case, and warns.
    shapes = tuple({i: auto for i, size in enumerate(one.shape) if size > 1} for one in given)
    exported = torch.export.export(flat, given, dynamic_shapes=(shapes,), strict=False)
    graph, signature = without_dead_calls(exported.graph), exported.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    used = {name: target for name, target in targets.items() if nodes[name].users}
    user_inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    numbers = {
        position: number
        for number, position in enumerate(
            i for i, name in enumerate(user_inputs) if nodes[name].users
        )
    }
    inputs = [
        _describe(places[position], given[position], nodes[user_inputs[position]])
        for position in numbers
    ]
    lifted = signature.inputs_to_lifted_tensor_constants
    kept_as = {
        name: f"{prefix}{_LIFTED if name in lifted else ''}{target}"
        for name, target in used.items()
    }
    keys: dict[str, int | str] = {**kept_as}
    keys.update({user_inputs[position]: number for position, number in numbers.items()})
    program = encode(graph, keys)
    state: dict[str, Any] = {**exported.state_dict, **exported.constants}
    constants = {kept_as[name]: state[used[name]].detach().cpu() for name in used}
    kept = [[name, without_unused(spec, numbers)] for name, spec in zip(names, specs, strict=True)]
    return Recording(kept, inputs, numbers, outputs[-1], program, constants)


def _specs_of(
    names: Sequence[str], arguments: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return the spec of each argument, and the tensors of all."""
    tensors: list[Tensor] = []
    pairs = zip(names, arguments, strict=True)
    return [flatten(argument, name, tensors) for name, argument in pairs], tensors


def explain_missing(error: KeyError, what: str, given: Sequence[Any]) -> Exception:
    """Return an error that says which entry of an example is missing; the error itself if none is.

    Args:
        error: Of a function.
        what: The function.
        given: Its arguments.
    """
    key = error.args[0] if error.args else None
    entries = [list(argument) for argument in given if isinstance(argument, Mapping)]
    if not entries or any(key in of_one for of_one in entries):
        return error
    found = entries[0] if len(entries) == 1 else entries
    return ValueError(
        f"example: {what} looks for {key!r}, and there is none; the example's entries are {found}"
    )


def _describe(place: str, tensor: Tensor, node: torch.fx.Node) -> TensorSpec:
    """Return the description of an input; ValueError if it has a number of samples of its own."""
    sizes = [_constant(size) for size in node.meta["val"].shape]
    if sizes and sizes[0] is not None:
        raise ValueError(
            f"example: {place} has {sizes[0]} samples or ids, and the model's program would take "
            "no other number; give an example of several samples and ids, and have forward not "
            "depend on how many there are (torch.export follows tensor.shape[0], not len(tensor))"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(place, dtype, sizes)


def _constant(size: int | torch.SymInt) -> int | None:
    """Return a size if the program is for that one alone, or None."""
    if isinstance(size, int):
        return size
    expression = size.node.expr  # a number, where recording has made one of the symbol
    return int(expression) if expression.is_number else None


def _name_tensors(spec: dict[str, Any], where: str, names: list[str]) -> None:
    """Append the name of each tensor of a spec."""
    ((kind, content),) = spec.items()
    if kind == "tensor":
        names.append(where)
    elif kind in RAGGED:
        for part, field in zip(content, RAGGED[kind]._fields, strict=True):
            _name_tensors(part, f"{where}.{field}", names)
    elif isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, part in items:
            _name_tensors(part, f"{where}[{key!r}]", names)


def _argument_names(model: nn.Module, count: int) -> list[str]:
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return [*names, *(f"argument {i}" for i in range(len(names), count))][:count]


@contextmanager
def _without_anchors(model: nn.Module) -> Iterator[None]:
    """Take the tables' anchors out of the parameters: torch finds them by paths of attributes.

    A table may be called as a method of a module is, "type" for one, and no path leads to it.
    """
    taken = [(table, table._parameters.pop("anchor")) for table in hash_tables(model)]
    try:
        yield
    finally:
        for table, anchor in taken:
            table._parameters["anchor"] = anchor


__all__ = [
    "CONVERTED",
    "Recording",
    "as_arguments",
    "explain_missing",
    "record_conversion",
    "record_model",
]
