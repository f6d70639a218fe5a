"""Bytes that a compiled TPU program moves between a chip's memory and its cores, counted in its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from _aot import BYTES, _computations, _multiplicities

FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant", "iota", "after-all")
"""Instructions that move nothing by themselves."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def size(shape: str) -> int:
    """Bytes of an array, or of a tuple's arrays; 0 of those that live on the core (memory space 1)."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4)
        for dtype, dims, layout in found
        if "S(1)" not in layout
    )


def traffic(text: str) -> dict[str, int]:
    """Bytes read and written by every instruction that runs, loops of unknown length once; keys say where and what.

    A fusion reads of an operand only what it slices or gathers; what it scatters into is written where that lies.
    Custom calls count without their operands: what a kernel reads of them its text does not say.
    """
    bodies = {name: [i for line in lines if (i := _parse(line))] for name, lines in _computations(text)}
    times = _multiplicities(dict(_computations(text)), unknown=1)
    run = {"ENTRY"} | {n for lines in bodies.values() for i in lines for n in _loops(i)}
    found: dict[str, int] = {}
    for name in run & bodies.keys():
        shapes = {i.name: i.result for i in bodies[name]}
        for i in bodies[name]:
            if cost := times[name] * _cost(i, shapes, bodies):
                found[f"{name}/{i.name} = {i.result[:60]} {i.opcode}"] = cost
    return found


def _loops(i: Instruction) -> list[str]:
    return re.findall(r"(?:body|condition|branch_computations=\{[^}]*)=?%([\w.-]+)", i.rest)


def _parse(line: str) -> Instruction | None:
    match = re.match(r"(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
    if match is None:
        return None
    head = match[4].split("), ")[0]
    return Instruction(match[1], match[2], match[3], tuple(re.findall(r"%([\w.-]+)", head)), match[4])


def _cost(i: Instruction, shapes: dict[str, str], bodies: dict[str, list[Instruction]]) -> int:
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    if i.opcode.endswith("-start"):
        # Its result holds its operand and where that goes: a read.
        return size(i.result.replace("S(1)", "")) - sum(size(shapes.get(o, "")) for o in i.operands)
    if i.opcode == "custom-call":
        return size(i.result)
    if i.opcode != "fusion":
        return size(i.result) + sum(size(shapes.get(o, "")) for o in i.operands)
    inside, total, written = _called(i, bodies), 0, size(i.result)
    for number, operand in enumerate(i.operands):
        if whole := size(shapes.get(operand, "")):
            part = _part(inside, number, bodies)
            total += whole if part is None else min(part, whole)
            written -= whole if part == 0 else 0
    return total + max(written, 0)


def _called(i: Instruction, bodies: dict[str, list[Instruction]]) -> list[Instruction]:
    return bodies[re.search(r"calls=%([\w.-]+)", i.rest)[1]]


def _part(inside: list[Instruction], number: int, bodies: dict[str, list[Instruction]]) -> int | None:
    """Bytes that a fusion reads of its operand `number`: 0 if it only writes into it, None for all."""
    name = next(p.name for p in inside if p.opcode == "parameter" and p.rest.startswith(f"{number})"))
    total = 0
    for user in inside:
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += size(user.result.replace("S(1)", ""))
        elif user.opcode == "fusion":
            part = _part(_called(user, bodies), user.operands.index(name), bodies)
            if part is None:
                return None
            total += part
        elif user.opcode not in ("scatter", "dynamic-update-slice"):
            return None
    return total
