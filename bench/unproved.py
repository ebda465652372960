"""Rows that a first pass on a GPU would leave unproved, by simulation on the CPU: ``python -m bench unproved``.

Operands are rounded, bounds computed and candidates counted as `csrc_triton.rows`, `columns`, `select` and `finish` do;
the product itself is torch's in float32, whose error is inside the same bound. No time is measured.

A row is *unproved* when it has more candidates than there is room for (it is done again with four times the room),
*crowded* when groups with two candidates have to be scored in full on the device, and *hopeless* when those are too
many or the bound proves nothing: then the torch backend scores the row.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import commit, versions
from bench.record import RESULTS, save

KINDS = ("gaussian", "heavy-tailed", "outlier")
DEPTHS = (768, 2304, 4096, 5120)
KS = (10, 25, 32, 100)
STEP = 1 << 13
"""Columns at a time."""
APART = 32
"""Columns set apart at most, as in `csrc_triton.finish`."""
UNIT = 2.0**-24
GOAL = 0.02


class Problem(NamedTuple):
    """Rows and columns drawn at random."""

    kind: str
    d: int
    V: int
    rows: int
    dtype: torch.dtype

    def features(self) -> Tensor:
        """F [rows, d]."""
        generator = torch.Generator().manual_seed(1)
        F = torch.randn(self.rows, self.d, generator=generator)
        if self.kind == "heavy-tailed":
            F *= torch.randn(self.rows, self.d, generator=generator).exp()
        if self.kind == "outlier":
            F[:, :4] *= 50
        return F.to(self.dtype)

    def blocks(self) -> Iterator[Tensor]:
        """W in blocks of columns [STEP, d], the same ones each time."""
        for start in range(0, self.V, STEP):
            generator = torch.Generator().manual_seed(2 + start)
            W = torch.randn(min(STEP, self.V - start), self.d, generator=generator)
            if self.kind == "heavy-tailed":
                W *= (0.5 * torch.randn(len(W), 1, generator=generator)).exp()
            if self.kind == "outlier":
                W[:, :4] *= 20
                if start == 0:
                    W[:8] *= 1000
            yield W.to(self.dtype)


class Columns(NamedTuple):
    """What `csrc_triton.columns.prepare` would measure."""

    norm: float
    error: float
    exponent: int
    longest: float
    """Columns longer than this are set apart."""


def prepare(problem: Problem) -> Columns:
    """Norms, columns set apart and rounding of W."""
    scaled = problem.dtype == torch.float32
    norms, peaks, errors = [], [], []
    for W in problem.blocks():
        norms.append(torch.linalg.vector_norm(W.float(), dim=1))
        peaks.append(W.abs().amax(1).float())
        if scaled:
            # Relative to a power of two, rounding does not depend on the exponent (but for subnormal numbers).
            errors.append(torch.linalg.vector_norm(W - _rounded(W, peaks[-1].amax()), dim=1))
    norm, peak = torch.cat(norms), torch.cat(peaks)
    longest = 2 * float(norm.topk(APART + 1).values[-1])
    kept = norm <= longest
    exponent = 15 - math.frexp(float(peak[kept].amax()))[1] if scaled else 0
    error = float(torch.cat(errors)[kept].amax()) * 1.001 if scaled else 0.0
    return Columns(float(norm[kept].amax()) * 1.001, error, exponent, longest)


def _rounded(x: Tensor, peak: Tensor) -> Tensor:
    """x rounded to float16 after the power of two that brings its peak to 2^14 … 2^15."""
    power = 2.0 ** (15 - torch.frexp(peak).exponent.float())
    return (x * power).half().float() / power


def errors_of(problem: Problem, F: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Operands of the pass and its error bound [rows], by the formula of `csrc_triton.rows`."""
    wide = F.float()
    narrow = _rounded(wide, wide.abs().amax(1, keepdim=True)) if F.dtype == torch.float32 else wide
    norm = torch.linalg.vector_norm(wide, dim=1) * 1.001
    rounded = torch.linalg.vector_norm(wide - narrow, dim=1) * 1.001
    seen, w_seen = norm + rounded, columns.norm + columns.error
    summing, rescoring = 2 * (problem.d + 8) * UNIT, (math.ceil(problem.d / 128) + 128) * UNIT
    dots = rounded * columns.norm + seen * columns.error + summing * seen * w_seen + rescoring * norm * columns.norm
    return narrow, 1.001 * (dots + 6e-7 * norm * columns.norm)


def winners(problem: Problem, narrow: Tensor, columns: Columns, sizes: set[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Best and second of each group of so many columns [rows, groups, 2], and the scores of columns set apart."""
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    apart = []
    for W in problem.blocks():
        wide = W.float()
        far = torch.linalg.vector_norm(wide, dim=1) > columns.longest
        if bool(far.any()):
            apart.append(narrow @ wide[far].T)
            wide = wide.masked_fill(far[:, None], 0)
        if problem.dtype == torch.float32:
            wide = (wide * 2.0**columns.exponent).half().float() * 2.0**-columns.exponent
        scores = narrow @ wide.T
        for size, parts in found.items():
            # Of every 4 · size columns the pairs (c // 2) % 4, as the accumulator's threads hold them.
            groups = scores.view(len(scores), -1, size // 2, 4, 2).transpose(2, 3).reshape(len(scores), -1, size)
            parts.append(groups.topk(2, dim=2).values)
    known = {size: torch.cat(parts, 1) for size, parts in found.items()}
    return known, torch.cat(apart, 1) if apart else narrow.new_zeros(len(narrow), 0)


def group_of(problem: Problem, k: int) -> int:
    """Columns of a group in a call for k on an H100."""
    from csrc_triton.configs import choose

    narrow = torch.float16 if problem.dtype == torch.float32 else problem.dtype
    return choose("sm_90", narrow, problem.d, problem.V, k).config.group


def joined(best: Tensor, k: int) -> Tensor:
    """Best keys [rows, sets] of the sets that `csrc_triton.select` joins groups [rows, groups] to."""
    from csrc_triton.select import sets_of

    block = sets_of(best.shape[1], k)[0]
    padded = torch.nn.functional.pad(best, (0, -best.shape[1] % block), value=float(best.min()))
    return padded.unflatten(1, (-1, block)).amax(1)


def bisect(best: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Threshold, a score, and turns of the bisection of `csrc_triton.select`, [rows] each.

    Args:
        best: [rows, sets] finite best scores.
        key: [rows], of a score of 1.
        k: how many sets have to reach the threshold.
    """
    keys = (best * key[:, None]).long()
    low, high = keys.amin(1), keys.amax(1) + 1
    reaching, taken = torch.full_like(low, keys.shape[1]), torch.zeros_like(low)
    while bool((going := (reaching > k + k // 32) & (high - low > 1)).any()):
        middle = (low + high) >> 1
        count = (keys >= middle[:, None]).sum(1)
        up, down = going & (count >= k), going & (count < k)
        low, high = torch.where(up, middle, low), torch.where(down, middle, high)
        reaching, taken = torch.where(up, count, reaching), taken + going
    return low / key, taken


def simulate(problem: Problem, ks: tuple[int, ...] = KS) -> list[dict[str, Any]]:
    """What becomes of the rows for each k: shares of unproved, crowded and hopeless rows (top side)."""
    from csrc_triton.epilogue import UNITS
    from csrc_triton.finish import MAX_SLOTS
    from querylens_fast.topk.triton_backend import WIDER, slots_for

    columns, F = prepare(problem), problem.features()
    narrow, error = errors_of(problem, F, columns)
    every, apart = winners(problem, narrow, columns, {group_of(problem, k) for k in ks})
    results = []
    key = 64 * UNITS / (torch.linalg.vector_norm(F.float(), dim=1) * columns.norm)
    for k in ks:
        n_apart, group = apart.shape[1], group_of(problem, k)
        known, best = every[group], every[group][:, :, 0]
        lowest, taken = bisect(joined(best, k + n_apart), key, k + n_apart)
        threshold = lowest - 2 * error
        count = (known >= threshold[:, None, None]).sum((1, 2))
        slots = slots_for(k + n_apart, problem.d, exact=problem.dtype != torch.float32)
        kth = torch.cat([known.flatten(1), apart], 1).topk(k, dim=1).values[:, -1]
        crowded = (known[:, :, 1] + error[:, None] >= kth[:, None]).sum(1)
        hopeless = (count > min(MAX_SLOTS, WIDER * slots)) | (crowded > 8 + k // 4)
        unproved = (count > slots) & ~hopeless
        results.append(
            {
                "kind": problem.kind,
                "d": problem.d,
                "V": problem.V,
                "rows": problem.rows,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "k": k,
                "group": group,
                "slots": slots,
                "columns_apart": n_apart,
                "median_candidates": float(count.float().median()),
                "turns": float(taken.float().median()),
                "p99_candidates": float(count.float().quantile(0.99)),
                "crowded": float((crowded > 0).float().mean()),
                "mean_crowded_groups": float(crowded.float().mean()),
                "unproved": float(unproved.float().mean()),
                "hopeless": float(hopeless.float().mean()),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = ["data          dtype     d     k    slots  candidates (p99)  crowded  unproved  hopeless"]
    for r in results:
        lines.append(
            f"{r['kind']:13s} {r['dtype']:9s} {r['d']:<5d} {r['k']:<4d} {r['slots']:<6d} "
            f"{r['median_candidates']:>8.0f} ({r['p99_candidates']:.0f})   {r['crowded']:>8.1%} {r['unproved']:>8.1%} "
            f"{r['hopeless']:>8.1%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench unproved", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of F for each case")
    parser.add_argument("--columns", type=int, default=1 << 18, help="rows of W")
    parser.add_argument("--d", type=int, action="append", help=f"default: {', '.join(map(str, DEPTHS))}")
    parser.add_argument("--out", type=Path, help="the JSON; default: in bench/results, by date")
    options = parser.parse_args(arguments)
    results = []
    for kind in KINDS:
        for d in options.d or DEPTHS:
            for dtype in (torch.float32, torch.bfloat16):
                results += simulate(Problem(kind, d, options.columns, options.rows, dtype))
                print(table(results[-len(KS) :]), flush=True)
    worst = max(results, key=lambda r: r["unproved"] + r["hopeless"])
    print(f"at most {worst['unproved'] + worst['hopeless']:.1%} of the rows (goal: {GOAL:.0%})")
    date = time.strftime("%Y-%m-%d")
    known = versions()
    record = {"simulation": True, "torch": known["torch"], "commit": commit(), "date": date, "goal": GOAL}
    save(options.out or RESULTS / f"unproved-rows-{date}.json", record | {"results": results})


if __name__ == "__main__":
    main()
