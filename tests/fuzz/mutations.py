"""Ways to damage a saved checkpoint, by accident or on purpose."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.shards import Shard, commit_of, rewrite, write_commit

ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 2**200, 0.5, 1e300, float("nan"),
    "", "0", "../..", "/", ".", "a/b", "\n", "\0", "x" * 5000, [], [1], {}, {"a": 1}, [[[]]],
)  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    """List the files that hold something; an empty one may be a lock."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def _bytes(change: Callable[[random.Random, bytearray], Any]) -> Callable[..., str]:
    """Return a mutation that changes the bytes of a file."""

    def mutate(rng: random.Random, file: Path) -> str:
        data = bytearray(file.read_bytes())
        return_value = change(rng, data)
        file.write_bytes(data)
        return f"{change.__name__.strip('_')} {return_value}"

    return mutate


def _flip(rng: random.Random, data: bytearray) -> int:
    at = rng.randrange(len(data) * 8)
    data[at // 8] ^= 1 << at % 8
    return at


def _flips(rng: random.Random, data: bytearray) -> list[int]:
    return [_flip(rng, data) for _ in range(rng.randrange(2, 20))]


def _flip_in_the_head(rng: random.Random, data: bytearray) -> int:
    at = rng.randrange(min(len(data), 300) * 8)
    data[at // 8] ^= 1 << at % 8
    return at


def _cut(rng: random.Random, data: bytearray) -> int:
    at = rng.choice((0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))))
    del data[at:]
    return at


def _lengthen(rng: random.Random, data: bytearray) -> int:
    more = rng.choice((1, 8, 4096))
    data.extend(bytes(more))
    return more


def _clear_a_block(rng: random.Random, data: bytearray) -> int:
    at, size = rng.randrange(len(data)), rng.choice((16, 64, 512))
    size = min(size, len(data) - at)
    data[at : at + size] = bytes(size)
    return at


def _swap_blocks(rng: random.Random, data: bytearray) -> tuple[int, int]:
    size = min(32, len(data) // 4)
    one, two = rng.randrange(len(data) // 2 - size), rng.randrange(len(data) // 2, len(data) - size)
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
    return one, two


def _repeat(rng: random.Random, data: bytearray) -> int:
    data.extend(bytes(data))
    return len(data)


_FLIP = _bytes(_flip)
BYTES = [
    *(_FLIP, _FLIP, _FLIP),
    *map(_bytes, (_flips, _flip_in_the_head, _cut, _cut, _lengthen)),
    *map(_bytes, (_clear_a_block, _swap_blocks, _repeat)),
]


def replace_file(rng: random.Random, file: Path) -> str:
    """Put something else in a file's place."""
    kind = rng.choice(("nothing", "empty", "folder", "pipe", "loop", "socket", "null", "text"))
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(file.parent)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as ours:
                ours.bind(file.name[:80])
                if file.name[:80] != file.name:
                    os.rename(file.name[:80], file.name)
        finally:
            os.chdir(here)
    elif kind == "null":
        file.symlink_to("/dev/null")
    elif kind == "text":
        file.write_text(rng.choice(("{}", "[]", "null", "[" * 100_000, '{"a":' * 50_000, "é", "1")))
    return f"{kind} in its place"


def swap_files(rng: random.Random, folder: Path, older: Path) -> str:
    """Swap two files, or bring one of an older save."""
    shards = [file for file in files_of(folder) if file.suffix == ".safetensors"]
    one = rng.choice(shards)
    others = [file for file in shards if file != one]
    if others and rng.random() < 0.5:
        two = rng.choice(others)
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
        return f"{one.name[:12]} and {two.name[:12]} swapped"
    table = one.name.split(".")[0]
    (old,) = [file for file in files_of(older) if file.name.startswith(f"{table}.")][:1] or [one]
    shutil.copy(old, one)
    return f"{one.name[:12]} of an older save"


def _places(node: Any) -> list[tuple[Any, Any]]:
    """List each place of a JSON value, as the container and the key."""
    places = []
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        places.append((node, key))
        if isinstance(child, dict | list):
            places += _places(child)
    return places


def _edit(rng: random.Random, node: Any) -> str:
    """Change a JSON value at one place."""
    holder, key = rng.choice(_places(node))
    how = rng.choice(("odd", "odd", "odd", "delete", "rename", "deep"))
    if how == "delete":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice(("", "other", "../x", "ids"))] = holder.pop(key)
    elif how == "deep":
        holder[key] = _deep(200)
    else:
        how = holder[key] = rng.choice(ODD_VALUES)
    return f"{key!r} became {str(how)[:20]!r}"


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def edit_commit(rng: random.Random, folder: Path) -> str:
    """Change the commit, which has no checksum of its own."""
    commit = commit_of(folder)
    what = _edit(rng, commit)
    write_commit(folder, commit)
    return f"commit: {what}"


# ---- files whose checksums are right, as an attacker would write them


def craft(rng: random.Random, folder: Path) -> str:
    """Change a shard's header or rows, and fix all checksums."""
    shards = [file for file in files_of(folder) if file.suffix == ".safetensors"]
    shard = Shard(rng.choice(shards))
    what = rng.choice((_craft_metadata, _craft_shape, _craft_rows, _craft_rows))(rng, shard)
    rewrite(shard)
    return f"crafted {what}"


def _craft_metadata(rng: random.Random, shard: Shard) -> str:
    name = rng.choice(list(shard.metadata))
    value = json.loads(shard.metadata[name])
    if isinstance(value, dict) and value and rng.random() < 0.8:
        what = _edit(rng, value)
    else:
        value = rng.choice(ODD_VALUES)
        what = str(value)[:20]
    shard.metadata[name] = json.dumps(value)
    return f"field {name}: {what}"


def _craft_shape(rng: random.Random, shard: Shard) -> str:
    name = rng.choice(list(shard.tensors))
    dtype, shape, data = shard.tensors[name]
    kind = rng.choice(("wide", "narrow", "dtype", "claimed", "flat", "empty", "gone", "more"))
    if kind == "wide":
        times = rng.choice((2, 1000))
        shard.tensors[name] = [dtype, [shape[0], times, *shape[1:]], data * times]
        if len(shape) == 2:
            shard.tensors[name][1] = [shape[0], times * shape[1]]
    elif kind == "narrow" and shape[0]:
        shard.tensors[name] = [dtype, [shape[0] - 1, *shape[1:]], data[: -len(data) // shape[0]]]
    elif kind == "dtype":
        shard.tensors[name][0] = {"I64": "F64", "F32": "I32", "BF16": "F16"}.get(dtype, "I8")
    elif kind == "claimed":
        shard.tensors[name][1] = [rng.choice((2**40, 2**62, -1, 10**30)), *shape[1:]]
    elif kind == "flat":
        shard.tensors[name][1] = rng.choice(([], [len(data)], [0], [1, 1, *shape]))
    elif kind == "empty":
        shard.tensors[name] = [dtype, [0, *shape[1:]], b""]
    elif kind == "gone":
        del shard.tensors[name]
    else:
        shard.tensors[rng.choice(("more", "slots.more", ""))] = [dtype, shape, data]
    return f"shape of {name}: {kind}"


def _craft_rows(rng: random.Random, shard: Shard) -> str:
    name = rng.choice([name for name, (_, _, data) in shard.tensors.items() if data] or ["none"])
    if name == "none":
        return "nothing"
    _, shape, data = shard.tensors[name]
    item = len(data) // shape[0]
    kind = rng.choice(("first everywhere", "ones", "zeros", "backwards", "noise", "low", "high"))
    changed = {
        "first everywhere": lambda: data[:item] * shape[0],
        "ones": lambda: b"\xff" * len(data),
        "zeros": lambda: bytes(len(data)),
        "backwards": lambda: data[::-1],
        "noise": lambda: rng.randbytes(len(data)),
        "low": lambda: (b"\x00" * 7 + b"\x80") * (len(data) // 8) + data[len(data) // 8 * 8 :],
        "high": lambda: (b"\xff" * 7 + b"\x7f") * (len(data) // 8) + data[len(data) // 8 * 8 :],
    }[kind]()
    shard.tensors[name][2] = changed
    return f"rows of {name}: {kind}"
