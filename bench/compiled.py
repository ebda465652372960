"""The child of `bench.compile_check`: compiles kernel variants for one target and prints a line of JSON for each.

A process of its own, because a bad kernel can abort the compiler, and because Triton's interpreter has to be off from
the first import.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import machine_code
from csrc_triton.variants import Variant, variants

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cuda_resources(cubin: bytes) -> dict[str, Any]:
    """Registers and spills (bytes of stack and local memory a thread) of a cubin, and the shape of its code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True).stdout

        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        shape = machine_code.shape(machine_code.sass(dump("--dump-sass")))
    # A stack that no instruction touches is no spill.
    stack = int(found["STACK"]) + int(found["LOCAL"])
    return {
        "registers": int(found["REG"]),
        "spills": stack if shape.local_memory_instructions else 0,
        **shape._asdict(),
    }


def hip_resources(assembly: str) -> dict[str, Any]:
    """The same of AMDGCN assembly; spills to memory in bytes, and scalar registers kept in vector lanes beside them."""
    names = r"vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    found = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return {
        "registers": found["vgpr_count"],
        "spills": 4 * found["vgpr_spill_count"] + found["private_segment_fixed_size"],
        "scalar_spills_to_lanes": found["sgpr_spill_count"],
        **machine_code.shape(machine_code.amdgcn(assembly))._asdict(),
    }


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """One variant's registers, spills, shared memory and code.

    ``narrow_product`` says whether it multiplies 16-bit operands, which tensor cores must then do.
    """
    backend, arch, warp = TARGETS[target]
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=dict(variant.options))
    spent = time.perf_counter() - start
    resources = cuda_resources(compiled.asm["cubin"]) if backend == "cuda" else hip_resources(compiled.asm["amdgcn"])
    return {
        "compile_s": spent,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "warps": compiled.metadata.num_warps,
        "stages": getattr(compiled.metadata, "num_stages", None),
        "narrow_product": bool(re.search(r"tt\.dot[^\n]*x(bf16|f16)>", compiled.asm["ttir"])),
        **resources,
    }


def main() -> None:
    target, wanted = sys.argv[1], set(sys.argv[2:])
    for variant in variants(target):
        if variant.name in wanted:
            try:
                found = compile_variant(variant, target)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[-2000:]}
            print(json.dumps({"variant": variant.name, "target": target, **found}), flush=True)


if __name__ == "__main__":
    main()
