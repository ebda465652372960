"""What a compiler made of a kernel: its instructions, the main loop among them, and what follows it.

Loops are read off the branches: one to an earlier address closes a loop over what lies between. The main loop is an
innermost loop with matrix instructions (the one with most of them); the epilogue is what lies behind it up to the last
exit. What a compiler moves behind that (retries of waits) belongs to neither.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MATRIX_KINDS = ("UTC.MMA", "HGMMA", "v_mfma", "HMMA", "DMMA", "FFMA", "v_fma|v_pk_fma|v_fmac", "DFMA")
"""Patterns of the instructions that do the products, those of the newest hardware first; a kernel has the first found.

UTCHMMA: Blackwell's tensor memory; HGMMA: Hopper's wgmma; v_mfma: CDNA; HMMA: warp-level; the rest: no matrix unit.
"""


class Instruction(NamedTuple):
    """One instruction at its place."""

    address: int
    opcode: str
    target: int | None
    """Where it branches to, if it does."""
    last: bool
    """Whether the program can only end here."""


class Shape(NamedTuple):
    """Counts of instructions, as one warp (wavefront) sees them."""

    instructions: int
    matrix_kind: str | None
    """The opcode that does the products; None where a kernel has none."""
    matrix_instructions: int
    loop_instructions: int | None
    """In the main loop; None where no loop holds matrix instructions."""
    loop_matrix_instructions: int | None
    epilogue_instructions: int | None
    local_memory_instructions: int
    """Loads and stores of spilled registers."""
    cycles: int
    """Issue cycles of a scheduler for the whole code, once through (`issue_cycles`)."""
    epilogue_cycles: int | None
    inner_loops: list[int]
    """Issue cycles of one turn of each innermost loop, in the order of their addresses."""


def sass(text: str) -> list[Instruction]:
    """Instructions of ``cuobjdump --dump-sass``."""
    found = []
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for address, predicate, opcode, operands in re.findall(pattern, text, re.M):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith(("BRA", "JMP")) else None
        last = opcode == "EXIT" and not predicate
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None, last))
    return found


def amdgcn(text: str) -> list[Instruction]:
    """Instructions of AMDGCN assembly; addresses are line numbers."""
    lines = text.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if re.match(r"\.?LBB\w+:", line)}
    found = []
    for number, line in enumerate(lines):
        words = line.split(";")[0].split()
        if not line.startswith("\t") or not words or not re.match(r"(s|v|ds|buffer|global|flat|scratch)_", words[0]):
            continue
        target = labels.get(words[-1]) if words[0].startswith(("s_cbranch", "s_branch")) else None
        found.append(Instruction(number, words[0], target, words[0] == "s_endpgm"))
    return found


def shape(code: list[Instruction]) -> Shape:
    """Find the main loop and count."""
    end = max((i.address for i in code if i.last), default=max((i.address for i in code), default=0))
    kind = next((k for k in MATRIX_KINDS if any(re.match(k, i.opcode) for i in code)), None)
    products = [i for i in code if kind and re.match(kind, i.opcode)]
    loop = _main_loop(code, [i.address for i in products])
    inside = [i for i in code if loop and loop[0] <= i.address <= loop[1]]
    behind = [i for i in code if loop and loop[1] < i.address <= end]
    return Shape(
        sum(i.address <= end for i in code),
        products[0].opcode if products else None,
        len(products),
        len(inside) if loop else None,
        sum(bool(re.match(kind or "", i.opcode)) for i in inside) if loop else None,
        len(behind) if loop else None,
        sum(bool(re.match(r"LDL|STL|scratch_|buffer_(load|store).*scratch", i.opcode)) for i in code),
        sum(issue_cycles(i.opcode) for i in code if i.address <= end),
        sum(issue_cycles(i.opcode) for i in behind) if loop else None,
        [sum(issue_cycles(i.opcode) for i in code if a <= i.address <= b) for a, b in _inner_loops(code)],
    )


def issue_cycles(opcode: str) -> int:
    """Cycles for which an instruction of one warp occupies its scheduler's pipe.

    By the lanes of a Hopper multiprocessor (128 for float32, 64 for integers, 32 for shuffles and memory, 16 for
    special functions); 4 for a wavefront of 64 on a SIMD of 16 lanes. Matrix instructions are counted elsewhere.
    """
    if opcode.startswith(("v_", "ds_", "buffer_", "global_")):
        return 0 if opcode.startswith("v_mfma") else 4
    if re.match(r"s_|U[A-Z]|HGMMA|HMMA|NOP|WARPSYNC|BRA|EXIT", opcode):
        return 0 if "MMA" in opcode else 1
    if re.match(r"LD|ST|RED|ATOM|SHFL|BAR|SYNCS", opcode):
        return 4
    if re.match(r"MUFU|I2F|F2I|F2F|D[A-Z]", opcode):
        return 8
    return 1 if re.match(r"FFMA|FADD|FMUL|MOV|FMNMX|CS2R|S2R|S2UR|R2UR", opcode) else 2


def _inner_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Address ranges of the loops that hold no other loop."""
    loops = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    return sorted(a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops))


def _main_loop(code: list[Instruction], products: list[int]) -> tuple[int, int] | None:
    loops = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}

    def held(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address in products)

    busy = [loop for loop in loops if held(loop)]
    inner = [a for a in busy if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in busy)]
    return max(inner, key=lambda loop: (held(loop), loop[0] - loop[1]), default=None)
