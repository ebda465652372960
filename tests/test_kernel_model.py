"""The cost model and the simulation of unproved rows: on made-up code, and against the pipeline itself."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("kind", ["gaussian", "outlier"])
def test_simulated_rows_are_those_of_the_pipeline(kind: str) -> None:
    """The interpreted pipeline leaves as many rows and sides unproved as the simulation says (of the top)."""
    from bench.unproved import Problem, simulate
    from querylens_fast.topk import triton_backend as fused
    from querylens_fast.topk.request import Request

    problem = Problem(kind, 64, 4096, 12, torch.float32)
    expected = simulate(problem, (6,))[0]
    request = Request(problem.features(), torch.cat(list(problem.blocks())), 6, bottom=False, method="gemm")
    found = fused.topk(request, torch.float16)
    assert found.fallback_rows == 12 * expected["hopeless"] == 0
    assert abs(found.widened_rows - 12 * (expected["unproved"] + expected["crowded"])) <= 1


def test_predictions_add_up_and_name_what_they_lack() -> None:
    from bench.machine_code import issue_cycles
    from bench.model import GPUS, Code, Gpu, Shape, newest, predict

    assert [issue_cycles(x) for x in ("FFMA", "VIMNMX", "HGMMA.64x256x16.F32", "v_add_f32", "LDG.E")] == [1, 2, 0, 4, 4]
    rows = [{"kind": "gaussian", "dtype": "bfloat16", "d": 64, "k": 10, "unproved": 0.0}]
    rows[0] |= {"median_candidates": 20.0, "turns": 7.0, "crowded": 0.1, "mean_crowded_groups": 0.1, "group": 64}
    gpu, shape = GPUS["H100 SXM"], Shape(4096, 262144, 2304, 10, "bfloat16")
    code = Code(newest("compile-check-triton-3.9-*.json"), "sm_90")
    found = predict(shape, gpu, code, rows)
    assert found["total_ms"] >= found["gemm_16_bit_ms"] > 0
    twice = predict(shape._replace(n=8192), gpu, code, rows)
    assert twice["stages_ms"]["select"] == pytest.approx(2 * found["stages_ms"]["select"])
    slow = predict(shape, Gpu("sm_90", 66, 1.755, 494.5, 33.5, 1675), code, rows)
    assert slow["stages_ms"]["product: main loop"] == pytest.approx(2 * found["stages_ms"]["product: main loop"])
    with pytest.raises(ValueError, match="run `python -m bench compile_check"):
        code.one("magic")
    with pytest.raises(ValueError, match="run `python -m bench unproved`"):
        predict(shape._replace(dtype="float32"), gpu, code, rows)
