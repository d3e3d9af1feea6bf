"""Scan of compiled kernels for loads that another warp's store may overtake.

A value that all warps of a program load from one address, and that one of them stores back, needs a
barrier between: a warp that is late would read what was stored. It does no harm where only the
warp that stores uses the value, which is how most kernels update a row in place.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s*(?:@(!?%\w+)\s+)?([a-z][\w.]*)\s*(.*?);")
_REGISTER = re.compile(r"%\w+")
_NUMBER = re.compile(r"(?<![\w%])(-?\d+)\s*$")
_WARPS = 0b1100000  # bits of the thread's number that say its warp, of four warps


class Race(NamedTuple):
    """A load and a store of one address without a barrier between.

    Attributes:
        load: The instruction that several warps run.
        store: The one that one of them runs.
        use: One that uses the loaded value in other warps too.
    """

    load: str
    store: str
    use: str


class _Instruction(NamedTuple):
    guard: str | None
    op: str
    text: str
    targets: list[str]
    sources: list[str]
    address: tuple[str, ...]


def _read(ptx: str) -> list[_Instruction]:
    """Return the instructions of a kernel, in the order of the text."""
    found = []
    for line in ptx.splitlines():
        match = _LINE.match(line)
        if match is None or match[2].startswith(("reg", "file", "loc")):
            continue
        guard, op, rest = match.groups()
        place = re.search(r"\[(.*?)\]", rest)
        address = () if place is None else tuple(place[1].replace(" ", "").split("+"))
        registers = _REGISTER.findall(rest)
        if op.startswith("st.") or op.startswith(("bar", "bra", "red.", "ret")):
            targets, sources = [], registers
        elif "{" in rest and place is not None and rest.index("{") < rest.index("["):
            targets = _REGISTER.findall(rest[: rest.index("[")])
            sources = _REGISTER.findall(rest[rest.index("[") :])
        elif op.startswith("mov") and rest.lstrip().startswith("{"):
            targets = _REGISTER.findall(rest[: rest.index("}")])
            sources = _REGISTER.findall(rest[rest.index("}") :])
        else:
            targets, sources = registers[:1], registers[1:]
            if "|" in rest:
                targets, sources = registers[:2], registers[2:]
        found.append(_Instruction(guard, op, line.strip(), targets, sources, address))
    return found


def _thread_bits(code: list[_Instruction]) -> dict[str, int]:
    """Return the bits of the thread's number on which each register may depend."""
    bits: dict[str, int] = {"%tid": (1 << 32) - 1}
    for _ in range(2):  # twice, for what a loop carries
        for line in code:
            depends = 0
            for source in line.sources:
                depends |= bits.get(source, 0)
            number = _NUMBER.search(line.text.rstrip(";"))
            if "%tid" in line.sources:
                depends = 127
            elif number is not None and line.op.startswith("and."):
                shift = _shift(code, line.sources[0])
                depends &= (int(number[1]) & 0xFFFFFFFF) << shift
            elif number is not None and line.op.startswith("shr."):
                depends &= -1 << (int(number[1]) + _shift(code, line.sources[0]))
            for target in line.targets:
                bits[target] = bits.get(target, 0) | depends
    return bits


def _shift(code: list[_Instruction], register: str) -> int:
    """Return by how many bits a register is the thread's number shifted right, where it is."""
    for line in code:
        if register in line.targets and line.op.startswith("shr."):
            number = _NUMBER.search(line.text.rstrip(";"))
            return 0 if number is None else int(number[1])
    return 0


def _users(code: list[_Instruction], load: _Instruction) -> list[_Instruction]:
    """Return stores, to global or shared memory, that a loaded value reaches."""
    reached = set(load.targets)
    for _ in range(2):
        for line in code:
            if reached.intersection(line.sources) and not line.op.startswith("st."):
                reached.update(line.targets)
    stores = [line for line in code if line.op.startswith(("st.", "red.", "atom."))]
    return [line for line in stores if reached.intersection(line.sources)]


def find_races(ptx: str) -> list[Race]:
    """Return the races of a kernel of four warps.

    Args:
        ptx: Text of its PTX.
    """
    code = _read(ptx)
    bits = _thread_bits(code)
    found = []
    for i, load in enumerate(code):
        if not load.op.startswith("ld.global"):
            continue
        if _WARPS & ~bits.get(load.address[0], 0) == 0:
            continue  # each warp has an address of its own
        for store in code[i + 1 :]:
            if store.op.startswith(("bar.", "barrier.")):
                break
            if not store.op.startswith("st.global") or store.address != load.address:
                continue
            uses = [use for use in _users(code, load) if use.guard != store.guard]
            if uses:
                found.append(Race(load.text, store.text, uses[0].text))
            break
    return found


def without_barriers(ptx: str) -> str:
    """Return a kernel as it would be without any barrier."""
    return "\n".join(line for line in ptx.splitlines() if "bar.sync" not in line)


__all__ = ["Race", "find_races", "without_barriers"]
