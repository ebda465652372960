"""Is every variant and mode of the streamed top-k right: against float64, on fresh random and on adversarial data.

Fresh memory is filled with garbage before every call, so that an output that was never written shows.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import querylens_fast as ql
from bench.cases import ODD
from bench.timing import seconds
from csrc_triton.configs import INTERPRETED
from querylens_fast.demo import ASSETS
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.topk.torch_backend import Epilogue

KINDS = ("ties", "equal", "sorted", "one group", "infinite", "nan")
SMALL = [(1, 1, 1, 1), (35, 64, 523, 25), (9, 100, 603, 40)]
"""n, d, V, k for the interpreter."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: their largest)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def stable_topk(S: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Scores and ids by a stable sort of whole rows."""
    order = torch.sort(-S if largest else S, dim=1, stable=True).indices[:, :k]
    return S.gather(1, order), order


def _sides(found: TopK) -> list[tuple[Tensor, Tensor, bool]]:
    sides = found.sides()
    return [(sides[f"{side}_scores"], sides[f"{side}_ids"], side == "top") for side in ("top", "bottom")]


def random_rows(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    method: str,
    precision: str,
    terms: bool,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Gaussian data: the largest error of the scores, of the true scores at the ids, and of the statistics."""
    n, d, V, k = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    F, W = normal(n, d).to(dtype), normal(V, d).to(dtype)
    vectors: dict[str, Any] = {"bias": normal(V), "scale": normal(V).abs() + 0.1, "offset": normal(n)} if terms else {}
    epilogue = Epilogue(*(vectors.get(name) for name in Epilogue._fields))
    exact_F, exact_W = (F.bfloat16(), W.bfloat16()) if precision == "bf16" else (F, W)
    S = epilogue.apply_(exact_F.double() @ exact_W.double().T, slice(None), slice(None))
    with poisoned():
        found = streamed_topk(
            F, W, k, **vectors, backend="triton", method=method, precision=precision, statistics=terms
        )
    error = 0.0
    for scores, ids, largest in _sides(found):
        expected, _ = stable_topk(S, k, largest)
        error = max(error, float((scores.double() - expected).abs().max()))
        error = max(error, float((S.gather(1, ids) - expected).abs().max()))
    ok = error <= 1e-5 * math.sqrt(d) * max(1.0, float(S.abs().max()) / math.sqrt(d))
    if found.statistics is not None:
        spread = float(S.std()) if V > 1 else 1.0
        wrong = float((found.statistics.mean - S.mean(1)).abs().max()) / max(spread, 1e-30)
        wrong = max(wrong, float((found.statistics.logsumexp - S.logsumexp(1)).abs().max()) / max(spread, 1.0))
        ok, error = ok and wrong < 1e-3, max(error, wrong)
    return {"ok": ok, "error": error, "widened": found.widened_rows / (2 * n)}


def adversarial_rows(kind: str, dtype: torch.dtype, method: str, device: str, seed: int) -> dict[str, Any]:
    """Whole numbers, where ids have to equal those of a stable sort."""
    n, d, V, k = (12, 24, 601, 33) if INTERPRETED else (70, 40, 3001, 33)
    generator = torch.Generator(device).manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator, device=device).float()

    F, W, bias, scale, offset = integers(n, d), integers(V, d), integers(V), integers(V), integers(n)
    if kind == "equal":
        W[:] = W[:1].clone()
    if kind == "sorted":
        W[:] = (torch.arange(V, device=device) // 12)[:, None].float()
    if kind == "one group":
        W[:] = 0
        W[2:256:8] = 7
    if kind == "infinite":
        bias[5:40], bias[100:103] = -math.inf, math.inf
    if kind == "nan":
        bias[::3] = math.nan
        F[3] = math.nan
    S = (F.double() @ W.double().T + offset.double()[:, None]) * scale.double() + bias.double()
    with poisoned():
        found = streamed_topk(
            F.to(dtype), W.to(dtype), k, bias=bias, scale=scale, offset=offset, backend="triton", method=method
        )
    ok = True
    for scores, ids, largest in _sides(found):
        expected, order = stable_topk(S, k, largest)
        ok &= torch.equal(ids, order) and torch.allclose(scores.double(), expected, rtol=0, atol=0, equal_nan=True)
    return {"ok": ok, "widened": found.widened_rows / (2 * n)}


def transport(device: str) -> dict[str, Any]:
    """The demo's transport and signatures on a device against the CPU in float64, and the seconds they take."""
    tokens = ql.load_tokens(ASSETS / "tokens.safetensors").head(4 if INTERPRETED else 16)
    model, exact = ql.load_model(ASSETS / "model", device=device), ql.load_model(ASSETS / "model", dtype="float64")
    fitted: list[ql.Transport] = []
    settings: dict[str, Any] = {"energy": "probes", "n_probes": 4, "progress": False}
    fit_s = seconds(lambda: fitted.append(ql.fit_transport(model, tokens, **settings)), model.device)
    truth = ql.fit_transport(exact, tokens, **settings)
    errors = [
        float((found.cpu().double() - table[key]).norm() / table[key].norm())
        for ours, table in ((fitted[0].matrices, truth.matrices), (fitted[0].energies, truth.energies))
        for key, found in ours.items()
    ]
    dictionary = ql.load_dictionary(ASSETS / "sae_layer2")
    settings = {"preset": "query_lens_key", "features": slice(0, 256)}
    found = ql.signatures(dictionary, model, transport=fitted[0], **settings)
    expected = ql.signatures(dictionary, exact, transport=truth, **settings)
    errors.append(float((found.top_scores.double() - expected.top_scores).norm() / expected.top_scores.norm()))
    return {"ok": max(errors) < 1e-3, "error": max(errors), "fit_s": None if INTERPRETED else fit_s}


def run_all(device: str, seed: int, dtype: str, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every check of a dtype and a method, by name; a crash is a wrong result with its traceback."""
    kind_of = getattr(torch, dtype)
    tasks = []
    for shape in SMALL if INTERPRETED else ODD:
        precisions = ("exact", "float32", "bf16") if dtype == "float32" else ("exact",)
        for precision, terms in [(p, t) for p in precisions for t in (False, True)]:
            if method == "fused" and dtype == "float32" and (precision == "float32" or terms and precision == "exact"):
                continue  # float32 products (statistics are of them too) are the library's
            name = f"random {shape} {precision}{' terms, statistics' if terms else ''}"
            tasks.append((name, partial(random_rows, shape, kind_of, method, precision, terms, device, seed)))
    tasks += [(kind, partial(adversarial_rows, kind, kind_of, method, device, seed)) for kind in KINDS]
    for name, task in tasks:
        try:
            yield name, task()
        except Exception:
            yield name, {"ok": False, "error": traceback.format_exc()[-1500:]}
