"""The kernel compiles for every target we name, without a GPU: no register spills, no more shared memory than exists.

The compilation runs in a subprocess: Triton's interpreter must be off there, and a bad kernel can abort the compiler.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# dtype, pointer type, whether there is a bias, a scale, an offset and a ragged d.
VARIANTS = [
    ("bfloat16", "*bf16", False),
    ("bfloat16", "*bf16", True),
    ("float16", "*fp16", True),
    ("float32", "*fp32", True),
]

CHILD = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from csrc_triton.configs import topk_config
from csrc_triton.topk import _topk_kernel


def measure(backend, arch, warp, dtype, pointer, epilogue):
    config = topk_config(getattr(torch, dtype), backend, arch if backend == "cuda" else 0)
    flags = dict(HAS_BIAS=epilogue, HAS_SCALE=epilogue, HAS_OFFSET=epilogue, EVEN_K=not epilogue)
    constants = dict(flags, TOP=True, BOTTOM=True,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BAND=8)
    kinds = dict(F=pointer, W=pointer, bias="*fp32", scale="*fp32", offset="*fp32", top_keys="*i32", bottom_keys="*i32")
    names = _topk_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    # What a launch would see: allocations and row strides in multiples of 16.
    aligned = [i for i, name in enumerate(names) if name in kinds or name in ("stride_f", "stride_w", "d")]
    source = ASTSource(
        fn=_topk_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    result = {"shared": compiled.metadata.shared, "spills": 0, "config": list(config)}
    if backend == "cuda":
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        result |= {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}
    else:
        wanted = r"\.(vgpr_spill_count|private_segment_fixed_size|vgpr_count):\s+(\d+)"
        found = dict(re.findall(wanted, compiled.asm["amdgcn"]))
        result |= {"registers": int(found["vgpr_count"])}
        result["spills"] = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
    return result

target, variants = json.loads(sys.argv[1])
print(json.dumps([measure(*target, *variant) for variant in variants]))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps([TARGETS[target], VARIANTS])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for variant, result in zip(VARIANTS, json.loads(done.stdout), strict=True):
        assert result["spills"] == 0, (variant, result)
        assert result["shared"] <= SHARED_LIMIT[target], (variant, result)
