"""Every kind of kernel compiles for every target we name, without a GPU: no spills, no more memory than there is, wgmma
on Hopper. `bench.compile_check` is what does it; what it must find wrong is tested beside it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_check import failures

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
ROOT = Path(__file__).parent.parent


def compile_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compile_check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_short_list_compiles_for_every_target(tmp_path: Path) -> None:
    done = compile_check("--short", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    records = json.loads((tmp_path / "found.json").read_text())["variants"]
    assert {record["target"] for record in records} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    hopper = [r for r in records if r["target"] == "sm_90" and r["variant"].startswith("fused bf16")]
    assert hopper and all(r["matrix_kind"].startswith("HGMMA") and r["epilogue_instructions"] > 100 for r in hopper)
    assert any("tma" in r["variant"] for r in hopper) and all(r["spills"] == 0 for r in records)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 10**6}, "wants 1000000 bytes of shared memory"),
        ({"matrix_kind": "HMMA.16816", "narrow_product": True}, "multiplies 16-bit operands by HMMA"),
        ({"error": "PassManager::run failed"}, "does not compile: PassManager"),
    ],
)
def test_what_is_wrong_is_found(found: dict, message: str) -> None:
    right = {"target": "sm_90", "spills": 0, "local_memory_instructions": 0, "shared": 1024, "tensor_memory": 0}
    right |= {"matrix_kind": "HGMMA.64x256x16", "narrow_product": False}
    assert any(message in line for line in failures(right | found)) and failures(right) == []
