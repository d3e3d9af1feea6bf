"""Checks of arguments that several public classes and functions take."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_Class = TypeVar("_Class", bound=type)
# torch's own flags that a program is being recorded; asked in every lookup, so without wrappers.
_tracing_state = torch._C._get_tracing_state
_dispatch_mode = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_EXPORTS = "torch.export, torch.onnx.export, make_fx and FakeTensorMode"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


MAX_INT = 2**63 - 1  # of an int64


def check_int(name: str, value: int, least: int, alternative: str = "", most: int = MAX_INT) -> int:
    """Return ``value`` if it is an int in [least, most], else raise.

    Args:
        name: Of the argument.
        value: Of the argument.
        least: Smallest valid value.
        alternative: Other valid values, named in the error; the caller accepts them itself.
        most: Largest valid value.

    Raises:
        TypeError: ``value`` is no int.
        ValueError: ``value`` is out of range.

    Example:
        >>> check_int("filter_interval", 0, least=1, alternative=" or None")
        Traceback (most recent call last):
        ValueError: filter_interval: expected an int >= 1 or None, got 0
    """
    message = f"{name}: expected an int >= {least}{alternative}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    if value > most:
        bound = "2**63 - 1" if most == MAX_INT else str(most)
        raise ValueError(f"{name}: expected an int <= {bound}{alternative}, got {value!r}")
    return value


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an int in [-2**63, 2**64), as torch takes it, else raise."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected int, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [-2**63, 2**64), got {seed!r}")
    return seed


def check_str(name: str, value: str) -> str:
    """Return ``value`` if it is a str, else raise a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__} ({value!r})")
    return value


def check_path(name: str, path: Any) -> Path:
    """Return a path that was given as a str or ``os.PathLike``, else raise a TypeError.

    Example:
        >>> check_path("folder", None)
        Traceback (most recent call last):
        TypeError: folder: expected a path, got None
    """
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {path!r:.200}") from None


def check_folder(name: str, path: Any) -> Path:
    """Return the path of a folder that is there or can be made, else raise.

    Raises:
        NotADirectoryError: It is a file.
        TypeError: It is no path.
    """
    folder = check_path(name, path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, and {folder} is a file")
    return folder


def check_embedding_dim(embedding_dim: int) -> int:
    """Return ``embedding_dim`` if it is an int >= 1, else raise."""
    if hasattr(embedding_dim, "embedding_dim"):
        raise TypeError(
            f"embedding_dim: expected an int >= 1, got {embedding_dim!r}; options are for an "
            'engine: write EmbeddingEngine({"feature": option})'
        )
    return check_int("embedding_dim", embedding_dim, 1)


def check_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """Return a valid dtype of rows (given as a dtype, or by name as in YAML), else raise."""
    checked = _DTYPES.get(str(dtype).removeprefix("torch."))
    if checked is None:
        raise ValueError(f"{name}: expected torch.float32 or torch.bfloat16, got {dtype!r}")
    return checked


def check_exchange_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a valid dtype of what travels between ranks, else raise.

    Example:
        >>> check_exchange_dtype("bfloat16")
        torch.bfloat16
        >>> check_exchange_dtype("float16")
        Traceback (most recent call last):
        ValueError: exchange_dtype: expected torch.bfloat16 or None, got 'float16'
    """
    if dtype is None:
        return None
    if str(dtype).removeprefix("torch.") != "bfloat16":
        raise ValueError(f"exchange_dtype: expected torch.bfloat16 or None, got {dtype!r}")
    return torch.bfloat16


def is_row_dtype(dtype: torch.dtype) -> bool:
    """Return whether rows can be of a dtype."""
    return dtype in _DTYPES.values()


def check_ids(ids: Tensor, name: str = "ids") -> Tensor:
    """Return ``ids`` as int64 if it is a strided tensor of int64 or int32, else raise.

    Example:
        >>> check_ids(torch.tensor([7], dtype=torch.int32))
        tensor([7])
        >>> check_ids(torch.tensor([0.5]), "item")
        Traceback (most recent call last):
        TypeError: item: expected dtype torch.int64 or torch.int32, got torch.float32
    """
    if not isinstance(ids, Tensor):
        refuse_symbols(name, ids)
        raise TypeError(f"{name}: expected a Tensor of int64 or int32, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        if ids.dtype is not torch.int32:
            raise TypeError(f"{name}: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
        check_strided(ids, name)
        ids = ids.long()
    if type(ids) is not Tensor or ids.layout is not torch.strided:
        check_strided(ids, name)
    return ids.resolve_neg() if ids.is_neg() else ids


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise unless ``tensor`` is a dense one that has data: kernels read its memory.

    Raises:
        TypeError: It is not.
        RuntimeError: It has no data because torch records a program.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got one of layout {tensor.layout}")
    if type(tensor) is not Tensor and (
        is_traceable_wrapper_subclass(tensor)
        or tensor.untyped_storage().device.type != tensor.device.type
    ):
        check_not_traced(name, [tensor])
        raise TypeError(
            f"{name}: expected a Tensor with data, got a {type(tensor).__name__}, which has none"
        )


def check_not_traced(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise where torch records or transforms a program, which cannot follow a table's kernels.

    Args:
        what: Is looked up, for the error.
        tensors: Ids or weights; those that ``torch.func`` wraps have no memory.

    Raises:
        RuntimeError: torch traces, exports or transforms what runs.
    """
    if _tracing_state() is not None:
        kind = "torch.jit.trace (and torch.onnx.export over it)"
    elif _dispatch_mode(_FAKE) is not None or _dispatch_mode(_PROXY) is not None:
        kind = _EXPORTS
    elif _functorch_interpreter() is not None and any(map(_is_wrapped, tensors)):
        kind = "torch.func (vmap, grad, jvp)"
    elif forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        kind = "forward-mode differentiation (torch.autograd.forward_ad)"
    else:
        return
    refuse_recording(what, kind)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_fake_mode() -> bool:
    """Return whether new tensors have no memory that kernels could write to."""
    return _dispatch_mode(_FAKE) is not None


def is_recorded() -> bool:
    """Return whether torch records or transforms a program: what runs need not run on all ranks."""
    return (
        torch.compiler.is_compiling()
        or _tracing_state() is not None
        or _dispatch_mode(_FAKE) is not None
        or _dispatch_mode(_PROXY) is not None
        or _functorch_interpreter() is not None
        or forward_ad._current_level >= 0
    )


def is_plain_cpu(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers that the host can see: on the CPU, not recorded."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _tracing_state() is None
        and _dispatch_mode(_FAKE) is None
        and _functorch_interpreter() is None
    )


def refuse_fake_mode(what: str) -> NoReturn:
    """Raise because ``FakeTensorMode`` is active.

    Args:
        what: Is used.
    """
    refuse_recording(what, _EXPORTS)


def refuse_recording(what: str, kind: str) -> NoReturn:
    """Raise because a program is recorded.

    Args:
        what: Is looked up.
        kind: What records the program.
    """
    raise RuntimeError(
        f"{what}: {kind} cannot follow a lookup, whose kernels read and change memory behind "
        "torch's back; leave the lookup outside, and trace or export the module that takes "
        "embeddings (torch.export and torch.compile take lookups of modules in eval())"
    )


def refuse_symbols(what: str, value: object) -> None:
    """Raise where ``torch.fx.symbolic_trace`` passes a symbol for ids."""
    if isinstance(value, torch.fx.Proxy):
        refuse_recording(what, "torch.fx.symbolic_trace")


def refuse_script(what: str) -> NoReturn:
    """Raise where ``torch.jit.script`` asks a module to prepare itself."""
    refuse_recording(what, "torch.jit.script")


def check_bool(name: str, value: bool) -> bool:
    """Return ``value`` if it is a bool, else raise.

    Example:
        >>> check_bool("trainable", "no")
        Traceback (most recent call last):
        TypeError: trainable: expected a bool, got 'no'
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def check_padding_idx(padding_idx: int | None) -> int | None:
    """Return ``padding_idx`` if it is an int64 or None, else raise."""
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx: expected an int or None, got {padding_idx!r}")
    if not -(2**63) <= padding_idx < 2**63:
        raise ValueError(f"padding_idx: expected an int64, got {padding_idx!r}")
    return padding_idx


def check_bound(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Raise unless ``low <= value < high``."""
    wanted = f">= {low}" if high == math.inf else f"in [{low}, {high})"
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number {wanted}, got {value!r}")
    if not low <= value < high:
        kind = "finite number" if low <= value == high else "number"
        raise ValueError(f"{name}: expected a {kind} {wanted}, got {value!r}")


def check_betas(betas: Any) -> None:
    """Raise unless ``betas`` are two numbers from 0 to below 1, as Adam and Lion have them."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    check_bound("betas[0]", betas[0], high=1.0)
    check_bound("betas[1]", betas[1], high=1.0)


def check_kinds(**given: tuple[Any, type]) -> None:
    """Raise unless each value is of its kind, or None; say what to write.

    Args:
        given: Name of an argument -> its value and kind. A value that is of another argument's
            kind, or names a class of it, is told where it belongs.

    Raises:
        TypeError: A value is of another kind.

    Example:
        >>> from recis_lightning.eviction import Eviction
        >>> check_kinds(eviction=("max_rows", Eviction))
        Traceback (most recent call last):
        TypeError: eviction: expected Eviction, got 'max_rows'; write eviction=MaxRows(n=...)
    """
    for name, (value, kind) in given.items():
        if value is None or isinstance(value, kind):
            continue
        advice = ""
        for argument, (_, its_kind) in sorted(given.items(), key=lambda item: item[0] != name):
            wanted = _as_written(value, its_kind)
            if wanted:
                advice = f"; write {argument}={wanted}"
                break
        raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}{advice}")


def _as_written(value: Any, kind: type) -> str | None:
    """Return how to write the object of ``kind`` that ``value`` stands for; None if for none."""
    if isinstance(value, kind):
        return repr(value)
    given = value if isinstance(value, str) else getattr(value, "__name__", "")
    for cls in _subclasses(kind):
        if _plain(given) in (_plain(cls.__name__), _plain(f"{cls.__name__}{kind.__name__}")):
            parameters = inspect.signature(cls).parameters.values()
            needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
            return f"{cls.__name__}({', '.join(f'{name}=...' for name in needed)})"
    return None


def _subclasses(kind: type) -> Iterator[type]:
    """Yield the classes of a kind that can be made."""
    classes: list[type] = kind.__subclasses__()
    for cls in classes:
        if not inspect.isabstract(cls):
            yield cls
        yield from _subclasses(cls)


def _plain(name: str) -> str:
    """Return a name without what spellings differ in: "xavier_normal_" is "XavierNormal"."""
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


def explain_arguments(hints: Mapping[str, str] | None = None) -> Callable[[_Class], _Class]:
    """Return a class decorator: wrong and missing arguments are told what to write instead.

    Args:
        hints: Name of an argument that the class does not have -> what to do about it.

    Example:
        >>> @explain_arguments()
        ... class Filter:
        ...     def __init__(self, filter_step): ...
        >>> Filter(filter_steps=3)
        Traceback (most recent call last):
        TypeError: filter_steps: Filter has none; did you mean filter_step?
    """
    known_mistakes = {} if hints is None else hints

    def decorate(cls: _Class) -> _Class:
        init = cls.__init__  # type: ignore[misc]
        parameters = list(inspect.signature(init).parameters.values())[1:]
        ordered = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        needed = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]

        @functools.wraps(init)
        def explained(self: Any, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(ordered):
                advice = ""
                if ordered == ["embedding_dim"] and len(args) == 2:
                    advice = (
                        f"; any id gets a row when it occurs, so there is no num_embeddings: "
                        f"write {cls.__name__}({args[1]!r})"
                    )
                raise TypeError(
                    f"{cls.__name__}: expected {', '.join(ordered)} and the rest by name, "
                    f"got {args!r}{advice}"
                )
            for name in kwargs.keys() - names:
                if name in known_mistakes:
                    raise TypeError(f"{name}: {cls.__name__} has none; {known_mistakes[name]}")
                if not takes_any:
                    close = get_close_matches(name, names, 1)
                    advice = f"; did you mean {close[0]}?" if close else f", only {sorted(names)}"
                    raise TypeError(f"{name}: {cls.__name__} has none{advice}")
            for name in needed:
                if name not in kwargs and name not in ordered[: len(args)]:
                    given = "..., " if args or kwargs else ""
                    raise TypeError(
                        f"{name}: {cls.__name__} needs it; write {cls.__name__}({given}{name}=...)"
                    )
            init(self, *args, **kwargs)

        cls.__init__ = explained  # type: ignore[misc]
        return cls

    return decorate


# What users write of nn.Embedding, RecIS and torch.optim -> what to write.
OPTIMIZER_HINTS = {"learning_rate": "write lr=", "params": "write tables=hash_tables(module)"}
_LEAVE_OUT = "it does not exist here: leave it out"
HINTS = {
    "num_embeddings": "any id gets a row when it occurs: leave it out",
    "max_norm": "rows are not renormalised in a lookup: leave it out",
    "norm_type": "rows are not renormalised in a lookup: leave it out",
    "scale_grad_by_freq": _LEAVE_OUT,
    "sparse": "rows are always updated sparsely: leave it out",
    "embedding_shape": "write embedding_dim=",
    "emb_opt": "write embedding_dim= and the option's other fields",
    "admit_hook": "write admission=",
    "filter_hook": "write eviction=",
    **dict.fromkeys(("block_size", "children", "coalesced", "slice", "pg"), _LEAVE_OUT),
    **dict.fromkeys(("grad_reduce_by", "max_partition_num", "use_pinned_memory"), _LEAVE_OUT),
}


__all__ = [
    "HINTS",
    "MAX_INT",
    "OPTIMIZER_HINTS",
    "check_betas",
    "check_bool",
    "check_bound",
    "check_dtype",
    "check_embedding_dim",
    "check_folder",
    "check_ids",
    "check_int",
    "check_kinds",
    "check_not_traced",
    "check_padding_idx",
    "check_path",
    "check_seed",
    "check_str",
    "check_strided",
    "explain_arguments",
    "is_fake_mode",
    "is_plain_cpu",
    "is_row_dtype",
    "refuse_fake_mode",
    "refuse_recording",
    "refuse_script",
    "refuse_symbols",
]
