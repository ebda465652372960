"""Every way in which a kernel is launched, as what the compiler needs: one list for compile checks and tests."""

# pyright: reportFunctionMemberAccess=false

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from csrc_triton import rescore, winners
from csrc_triton.configs import TMA_TARGETS, Config, configs, persistent, statistics_config
from csrc_triton.select import MAX_KEYS, _select_kernel, warps_for
from csrc_triton.topk import _topk_kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Variant(NamedTuple):
    """One compilation of a kernel."""

    name: str
    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """Triton's type of every argument; "constexpr" for those of ``constexprs``."""
    constexprs: dict[str, Any]
    options: dict[str, int]
    """num_warps and num_stages."""
    aligned: tuple[str, ...]
    """Arguments that a launch would find to be multiples of 16."""
    short: bool
    """Whether it is in the short list: one of each kind."""


def variants(target: str) -> list[Variant]:
    """All variants for one of TARGETS."""
    found = []
    for dtype in POINTERS:
        for config, even in product(configs(target, dtype), (True, False)):
            found += [_fused(target, dtype, config, False, terms=terms, even=even) for terms in (False, True)]
        for even in (True, False):
            found.append(_fused(target, dtype, statistics_config(target, dtype), True, terms=True, even=even))
    for dtype, statistics in product(POINTERS, (False, True)):
        found.append(_winners(dtype, statistics))
    for block, largest in product((256, 2048, MAX_KEYS), (True, False)):
        found.append(_select(target, block, largest))
    found += [_rescore(dtype) for dtype in POINTERS]
    return found


def _fused(target: str, dtype: torch.dtype, config: Config, statistics: bool, *, terms: bool, even: bool) -> Variant:
    tma = target in TMA_TARGETS and even and config.tensor_cores(dtype)
    name = POINTERS[dtype]
    constexprs = {
        "HAS_BIAS": terms,
        "HAS_SCALE": terms,
        "HAS_OFFSET": terms,
        "TOP": True,
        "BOTTOM": True,
        "STATISTICS": statistics,
        "EVEN_K": even,
        "USE_TMA": tma,
        "PERSISTENT": persistent(tma=tma, terms=terms, statistics=statistics),
        "INPUT_PRECISION": config.input_precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BAND": 8,
    }
    types = {"F": f"*{name}", "W": f"*{name}"}
    if tma:
        types = {
            "F": f"tensordesc<{name}[{config.block_m},{config.block_k}]>",
            "W": f"tensordesc<{name}[{config.block_n},{config.block_k}]>",
        }
    shape = f"{config.block_m}x{config.block_n}x{config.block_k}w{config.num_warps}"
    extras = [config.input_precision] if dtype == torch.float32 else []
    extras += [
        word for word, on in (("tma", tma), ("ragged", not even), ("terms", terms), ("statistics", statistics)) if on
    ]
    return _variant(
        " ".join(["fused", name, shape, *extras]),
        _topk_kernel,
        types | _OUTPUTS,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        integers=("stride_f", "stride_w", "d"),
        short=dtype != torch.float16,
    )


def _winners(dtype: torch.dtype, statistics: bool) -> Variant:
    constexprs = {
        "HAS_BIAS": statistics,
        "HAS_SCALE": statistics,
        "HAS_OFFSET": statistics,
        "TOP": True,
        "BOTTOM": True,
        "STATISTICS": statistics,
        "BLOCK_M": winners.BLOCK_M,
        "BLOCK_N": winners.BLOCK_N,
    }
    return _variant(
        f"winners {POINTERS[dtype]}{' terms statistics' if statistics else ''}",
        winners._winners_kernel,
        {"dots": f"*{POINTERS[dtype]}"} | _OUTPUTS,
        constexprs,
        {"num_warps": winners.NUM_WARPS},
        integers=("stride",),
        short=dtype == torch.float32,
    )


def _select(target: str, block: int, largest: bool) -> Variant:
    return _variant(
        f"select {block} {'largest' if largest else 'smallest'}",
        _select_kernel,
        {"keys": "*i32", "found": "*i32", "places": "*i32", "left_out": "*i32"},
        {"LARGEST": largest, "GROUP": 64, "SLOTS": 64, "BLOCK": block},
        {"num_warps": warps_for(block, hip=target == "gfx942")},
        short=block == MAX_KEYS,
    )


def _rescore(dtype: torch.dtype) -> Variant:
    name = POINTERS[dtype]
    types = {"F": f"*{name}", "W": f"*{name}", "ids": "*i64"}
    types |= {vector: "*fp32" for vector in ("bias", "scale", "offset", "scores")}
    flags = {"HAS_BIAS": True, "HAS_SCALE": True, "HAS_OFFSET": True}
    return _variant(
        f"rescore {name}",
        rescore._rescore_kernel,
        types,
        flags | {"BLOCK_C": rescore.BLOCK_C, "BLOCK_K": rescore.BLOCK_K},
        {"num_warps": rescore.NUM_WARPS},
        integers=("stride_f", "stride_w", "d"),
        short=dtype == torch.float32,
    )


_OUTPUTS = {name: "*fp32" for name in ("bias", "scale", "offset", "shift", "sums")}
_OUTPUTS |= {"top_keys": "*i32", "bottom_keys": "*i32"}


def _variant(
    name: str,
    kernel: triton.JITFunction,
    types: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, int],
    *,
    integers: tuple[str, ...] = (),
    short: bool,
) -> Variant:
    """Every other argument is a 32-bit integer; ``integers`` are those that are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n in integers or signature[n].startswith("*")]
    return Variant(name, kernel, signature, constexprs, options, tuple(aligned), short)
