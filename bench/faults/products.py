"""Random calls of the streamed top-k on both backends against a stable sort of all scores, in a process of their own.

Inputs are small whole numbers (and NaN, infinities, ties, dead and equal rows, lazily negated views), so that scores
are exact and the comparison is equality. The Triton backend runs on the GPU where there is one, else under Triton's
interpreter, which has to be switched on before Triton is imported.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

SHAPES = [1, 2, 3, 17, 64, 100, 127, 128, 129, 255, 300, 513, 700]
KINDS = ["plain"] * 6 + ["equal", "dead", "sorted", "NaN", "infinite", "one hot", "negated view", "transposed view"]


def run(n_torch: int, n_triton: int, seed: int = 0) -> dict[str, Any]:
    """Counts of calls and of wrong ones, by backend."""
    variables = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    found: dict[str, Any] = {"problems": []}
    for backend, n in (("torch", n_torch), ("triton", n_triton)):
        command = [sys.executable, "-W", "ignore", "-m", "bench.faults.products", backend, str(n), str(seed)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            found["problems"].append(f"{backend}: the process ended with {done.returncode}: {done.stderr[-600:]}")
            continue
        counts = json.loads(done.stdout.splitlines()[-1])
        found["problems"] += [f"{backend}: {problem}" for problem in counts.pop("problems")]
        found[backend] = counts
    return found


def problem(seed: int) -> tuple[str, tuple[Tensor, Tensor], dict[str, Any]]:
    """(Kind, F and W, the call's other arguments), drawn from a seed."""
    draw = torch.Generator().manual_seed(seed)

    def one(options: list[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=draw))]

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=draw).float()

    kind, n, d, V = one(KINDS), one([1, 2, 5]), one([1, 3, 8, 16]), one(SHAPES)
    F, W = whole(n, d), whole(V, d)
    if kind == "equal":
        W[:] = W[:1].clone()
    elif kind == "dead":
        F[::2] = 0
    elif kind == "sorted":
        W[:] = torch.arange(V)[:, None].float()
    elif kind == "NaN":
        W[torch.rand(V, generator=draw) < 0.05] = math.nan
    elif kind == "infinite":
        W[torch.rand(V, d, generator=draw) < 0.03] = math.inf
    elif kind == "one hot":
        W[:] = 0
        W[one(list(range(V)))] = 1
    elif kind == "negated view":
        F, W = torch._neg_view(-F), torch._neg_view(-W)
    elif kind == "transposed view":
        W = W.T.contiguous().T
    more = {"bias": whole(V) if one([0, 1]) else None, "scale": whole(V) if one([0, 0, 1]) else None}
    return (
        kind,
        (F, W),
        {**more, "offset": whole(n) if one([0, 0, 1]) else None, "k": one([1, min(V, 5), min(V, 25), V])},
    )


def wrong(seed: int, backend: str, device: str) -> str | None:
    """What is wrong with one call's answer; None where it is right."""
    from querylens_fast.topk.api import streamed_topk

    kind, (F, W), given = problem(seed)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    found = streamed_topk(F.to(device), W.to(device), backend=backend, **there)  # type: ignore
    S = F.double() @ W.double().T
    S = S if given["offset"] is None else S + given["offset"].double()[:, None]
    S = S if given["scale"] is None else S * given["scale"].double()
    S = S if given["bias"] is None else S + given["bias"].double()
    for ids, scores, largest in (
        (found.top_ids, found.top_scores, True),
        (found.bottom_ids, found.bottom_scores, False),
    ):
        # NaN comes last on both sides.
        keys = torch.where(S.isnan(), -math.inf, S if largest else -S)
        order = torch.sort(keys, dim=1, descending=True, stable=True).indices
        last = torch.sort(S.isnan().gather(1, order).byte(), dim=1, stable=True).indices
        order = order.gather(1, last)
        expected = S.gather(1, order[:, : given["k"]])
        if not torch.allclose(scores.cpu().double(), expected, rtol=0, atol=0, equal_nan=True):  # type: ignore
            return f"seed {seed} ({kind}): other scores"
        if not torch.equal(ids.cpu(), order[:, : given["k"]]):  # type: ignore
            return f"seed {seed} ({kind}): other ids"
    return None


def main(backend: str, n: int, seed: int) -> None:
    torch.set_num_threads(1)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu":
        from bench.interpreter import widen_bfloat16

        widen_bfloat16()
    start, problems = time.monotonic(), []
    for i in range(n):
        said = wrong(seed + i, backend, device)
        if said:
            problems.append(said)
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"calls": n, "wrong": len(problems), "seconds": seconds, "problems": problems[:20]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
