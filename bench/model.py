"""Predicted stage times of the Triton backend, from compiled code and shapes: ``python -m bench model``.

Every figure is a **prediction**: nothing here has run on a GPU. For each stage of a block the larger of two times
counts, bytes over the memory's rate and issue cycles over the schedulers: cycles come from the instructions that
`bench.compile_check` counted in the code for the target (its record is read), everything else from the shape. The first
run of `bench.gpu_check` puts a measured time beside each line.

Assumptions, to be confirmed or refuted: the library's product reaches `Gpu.gemm_share` of the dense peak, and the
fused kernel's main loop the same; an epilogue adds to a main loop where one program has a multiprocessor, and hides
behind the other's where two share one; gathered rows of W all come from memory, which reaches 85 % of its nominal rate;
a launch from Python takes 20 us, which counts only where a block's kernels take less. The sum supposes that nothing
overlaps; "with settling beside the product" is the least it can be: registers for that are free only where the
product's programs have left a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import commit
from bench.record import RESULTS, save

MEMORY_SHARE = 0.85
LAUNCH_S = 20e-6
LAUNCHES = 6
BLOCK_ROWS = 16384
IDLE_CYCLES = 400
"""Of the four warps of a program that finds nothing to do."""


class Gpu(NamedTuple):
    """Nominal figures from the vendors' data sheets, dense."""

    target: str
    multiprocessors: int
    ghz: float
    narrow_tflops: float
    """16-bit operands, float32 sums."""
    float32_tflops: float
    memory_gb_s: float
    gemm_share: float = 0.7
    """What a library's large product reaches of its peak."""
    schedulers: int = 4

    def busy_s(self, cycles: float) -> float:
        """Seconds in which all schedulers together issue so many cycles."""
        return cycles / (self.multiprocessors * self.schedulers * self.ghz * 1e9)

    def moved_s(self, n_bytes: float) -> float:
        """Seconds for memory traffic."""
        return n_bytes / (self.memory_gb_s * 1e9 * MEMORY_SHARE)


GPUS = {
    "H100 SXM": Gpu("sm_90", 132, 1.755, 989, 67, 3350),
    "H200": Gpu("sm_90", 132, 1.755, 989, 67, 4800),
    "A100 SXM 80 GB": Gpu("sm_80", 108, 1.41, 312, 19.5, 2039, 0.85),
    "MI300X": Gpu("gfx942", 304, 2.1, 1307, 163.4, 5300, 0.5),
}


class Shape(NamedTuple):
    """One call."""

    n: int
    V: int
    d: int
    k: int
    dtype: str
    """Of F and W: "bfloat16", or "float32" through scaled float16."""
    sides: int = 2

    @property
    def flop(self) -> float:
        return 2.0 * self.n * self.V * self.d

    @property
    def bytes_each(self) -> int:
        return 4 if self.dtype == "float32" else 2


SHAPES = tuple(
    Shape(65536, V, d, k, dtype)
    for dtype in ("bfloat16", "float32")
    for d, V, k in ((2304, 262144, 32), (768, 50257, 25), (5120, 262144, 100))
)


class Code:
    """The compiled variants of a target, by name."""

    def __init__(self, path: Path, target: str) -> None:
        variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
        self.known = {v["variant"]: v for v in variants if v["target"] == target and "error" not in v}

    def one(self, *words: str) -> dict[str, Any]:
        """The variant with the shortest name that begins with the first word and holds all others.

        Raises:
            ValueError: None does.
        """
        names = [n for n in self.known if n.startswith(words[0]) and all(w in n.split() for w in words[1:])]
        if not names:
            raise ValueError(
                f"no compiled variant {' '.join(words)!r}: expected one; run `python -m bench compile_check`"
            )
        return self.known[min(names, key=len)]


def candidates(shape: Shape, simulated: list[dict[str, Any]]) -> dict[str, float]:
    """Candidates and crowded groups of a row and side, simulated on Gaussian data with the nearest d and k."""
    near = [r for r in simulated if r["kind"] == "gaussian" and r["dtype"] == shape.dtype]
    if not near:
        raise ValueError(f"no simulation of {shape.dtype} rows: expected a record; run `python -m bench unproved`")
    return min(near, key=lambda r: (abs(r["d"] - shape.d), abs(r["k"] - shape.k)))


def stages(shape: Shape, gpu: Gpu, code: Code, simulated: list[dict[str, Any]]) -> dict[str, float]:
    """Predicted milliseconds of each stage of a call."""
    import torch

    from csrc_triton.configs import choose
    from csrc_triton.winners import TILE

    narrow = torch.float16 if shape.dtype == "float32" else torch.bfloat16
    choice = choose(gpu.target, narrow, shape.d, shape.V, shape.k)
    n, V, d, sides = shape.n, shape.V, shape.d, shape.sides
    found = candidates(shape, simulated)
    name, pair = ("fp16", "fp32 fp32") if shape.dtype == "float32" else ("bf16", "bf16 bf16")
    lines = n * sides
    gemm_s = shape.flop / (gpu.narrow_tflops * 1e12 * gpu.gemm_share)
    # Norms; float32 is read again and written in 16 bits.
    times = {"prepare W": gpu.moved_s(V * d * (4 + 4 + 2 if shape.dtype == "float32" else 2))}
    row_bytes = n * d * (2 * shape.bytes_each + (2 if shape.dtype == "float32" else 0))
    times["rows"] = gpu.moved_s(row_bytes)
    times["product: main loop"] = gemm_s
    groups = (choice.config if choice.method == "fused" else TILE).groups(V)
    times |= _epilogue(shape, gpu, code, name, choice, gemm_s)
    times["select"] = _selection(gpu, code, lines, groups, found, shape.k)
    times["finish"] = _scoring(gpu, code.one(f"finish {pair}", "64"), lines, found["median_candidates"], 32, shape)
    opened, columns = (
        lines * found["crowded"],
        found["group"] * found["mean_crowded_groups"] / max(found["crowded"], 1e-9),
    )
    crowded_s = _scoring(gpu, code.one(f"open groups {pair}", "64"), opened, columns, 32, shape)
    times["open groups"] = crowded_s + gpu.busy_s(lines * IDLE_CYCLES)
    redone = found["unproved"] * (sum(times.values()) - times["prepare W"]) * 1.0
    times["rows done again"] = redone
    launches = LAUNCHES * math.ceil(n / BLOCK_ROWS) * LAUNCH_S
    times["launches, if nothing hid them"] = launches
    return {stage: 1e3 * t for stage, t in times.items()}


def _epilogue(shape: Shape, gpu: Gpu, code: Code, name: str, choice: Any, gemm_s: float) -> dict[str, float]:
    """What the winners cost beside the main loop: in the fused kernel, or as a pass over the library's product."""
    if choice.method == "gemm":
        winners = code.one("winners fp32")
        programs = math.ceil(shape.n / 16) * math.ceil(shape.V / 256)
        written = shape.n * shape.V * 4.0
        issue = gpu.busy_s(programs * winners["warps"] * winners["cycles"])
        return {"product: written and read": gpu.moved_s(2 * written), "product: winners": issue}
    tile = choice.config
    split = ["split"] if tile.splits > 1 else []
    fused = code.one(f"fused {name} {tile.block_m}x{tile.block_n}x{tile.block_k}w{tile.num_warps}", *split)
    tiles = math.ceil(shape.n / tile.block_m) * math.ceil(shape.V / tile.block_n)
    issue = gpu.busy_s(tiles * tile.num_warps * (fused["epilogue_cycles"] or fused["cycles"]))
    hidden = min(issue, gemm_s) if tile.blocks_per_sm > 1 else 0.0
    written = 8.0 * tile.groups(shape.V) * shape.n * shape.sides
    return {"product: epilogue": issue - hidden, "product: winners written": gpu.moved_s(written)}


def _selection(gpu: Gpu, code: Code, lines: float, groups: int, found: dict[str, float], k: int) -> float:
    """Seconds of the selection for each row and side: loading, bisection, and the chosen sets, 64 at a time."""
    from csrc_triton.select import CHUNK, sets_of

    block, parts = sets_of(groups, k)
    compiled = code.one("select", f"{block}x{parts}")
    loads, bisection, chosen = *compiled["inner_loops"][:2], max(compiled["inner_loops"][2:])
    cycles = compiled["cycles"] + (math.ceil(groups / (block * parts)) - 1) * loads
    cycles += (found["turns"] - 1) * bisection + (math.ceil(found["median_candidates"] / CHUNK) - 1) * chosen
    return max(gpu.busy_s(lines * compiled["warps"] * cycles), gpu.moved_s(lines * groups * 4))


def _scoring(gpu: Gpu, compiled: dict[str, Any], lines: float, columns: float, at_a_time: int, shape: Shape) -> float:
    """Seconds of exact scores of so many columns for each row and side."""
    # The loop over d: cycles are no fewer than instructions, and other inner loops are longer.
    turn = min((c for c in compiled["inner_loops"] if c >= compiled["loop_instructions"]), default=0)
    cycles = compiled["cycles"] + turn * math.ceil(shape.d / 128) * columns / at_a_time
    moved = lines * columns * shape.d * shape.bytes_each
    return max(gpu.busy_s(lines * compiled["warps"] * cycles), gpu.moved_s(moved))


def predict(shape: Shape, gpu: Gpu, code: Code, simulated: list[dict[str, Any]]) -> dict[str, Any]:
    """Stage times of a shape on a GPU, their sum, and what they are compared with."""
    times = stages(shape, gpu, code, simulated)
    settled = times["finish"] + times["open groups"]
    total = sum(t for stage, t in times.items() if not stage.startswith("launches"))
    total = max(total, times["launches, if nothing hid them"])
    beside = total - min(settled, 0.5 * times["product: main loop"])
    gemm = shape.flop / (gpu.narrow_tflops * 1e9 * gpu.gemm_share)
    float32 = shape.flop / (gpu.float32_tflops * 1e9 * gpu.gemm_share)
    return {
        "shape": shape._asdict(),
        "stages_ms": times,
        "total_ms": total,
        "total_with_settling_beside_ms": beside,
        "gemm_16_bit_ms": gemm,
        "gemm_float32_ms": float32,
        "total_over_gemm": total / gemm,
        "beside_over_gemm": beside / gemm,
        "float32_gemm_over_total": float32 / total,
    }


def table(name: str, found: dict[str, Any]) -> str:
    """One prediction as text."""
    shape = Shape(**found["shape"])
    lines = [f"{name}: {shape.n:,} × {shape.V:,} × {shape.d}, k = {shape.k}, {shape.dtype} (prediction)"]
    lines += [f"  {stage:32s} {ms:9.2f} ms" for stage, ms in found["stages_ms"].items()]
    lines.append(f"  {'sum':32s} {found['total_ms']:9.2f} ms = {found['total_over_gemm']:.2f} × the 16-bit product")
    lines.append(
        f"  {'with settling beside the product':32s} {found['total_with_settling_beside_ms']:9.2f} ms at the least"
    )
    if shape.dtype == "float32":
        lines.append(
            f"  float32 product: {found['gemm_float32_ms']:.0f} ms = {found['float32_gemm_over_total']:.1f} × the sum"
        )
    return "\n".join(lines)


def newest(pattern: str) -> Path:
    """The newest committed record of a name.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(RESULTS.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern!r} in {RESULTS}: expected a record; make it first (see bench/README.md)")
    return found[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiled", type=Path, help="a record of compile_check; default: the newest committed one")
    parser.add_argument("--unproved", type=Path, help="a record of `bench unproved`; default: the newest committed one")
    parser.add_argument("--out", type=Path, help="the JSON; default: in bench/results, by date")
    options = parser.parse_args(arguments)
    compiled = options.compiled or newest("compile-check-triton-3.9-*.json")
    rows = options.unproved or newest("unproved-rows-*.json")
    simulated = json.loads(rows.read_text(encoding="utf-8"))["results"]
    predictions: dict[str, list[dict[str, Any]]] = {}
    for name, gpu in GPUS.items():
        code = Code(compiled, gpu.target)
        predictions[name] = [predict(shape, gpu, code, simulated) for shape in SHAPES]
        print("\n\n".join(table(name, found) for found in predictions[name]) + "\n")
    date = time.strftime("%Y-%m-%d")
    record = {"prediction": True, "measured": False, "commit": commit(), "date": date, "assumptions": __doc__}
    record |= {"compiled": compiled.name, "unproved": rows.name, "gpus": {n: g._asdict() for n, g in GPUS.items()}}
    save(options.out or RESULTS / f"model-prediction-{date}.json", record | {"predictions": predictions})


if __name__ == "__main__":
    main()
