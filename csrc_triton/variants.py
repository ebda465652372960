"""Every way in which a kernel is launched, as what the compiler needs: one list for compile checks and tests."""

# pyright: reportFunctionMemberAccess=false

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from csrc_triton import columns, finish, rows, sums, winners
from csrc_triton.configs import TMA_TARGETS, Config, configs, light, persistent, statistics_config
from csrc_triton.epilogue import UNITS
from csrc_triton.select import CHUNK, MAX_BLOCK, _select_kernel, warps_for
from csrc_triton.topk import _topk_kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NARROW = (torch.bfloat16, torch.float16)
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
    for dtype in NARROW:
        for config in configs(target, dtype):
            for terms in (False, True):
                kinds = [kind for kind in _KINDS if config.group > 32 or "split" not in kind]
                found += [_fused(target, dtype, config, terms=terms, **kind) for kind in kinds]
        statistics = statistics_config(target, dtype)
        found.append(_fused(target, dtype, statistics, terms=True, statistics=True))
        found.append(_fused(target, dtype, statistics, terms=True, statistics=True, ragged=True))
    for dtype, fixed, ragged in product(POINTERS, (True, False), (False, True)):
        found.append(_winners(dtype, fixed, ragged, statistics=False))
    found += [_winners(dtype, True, True, statistics=True) for dtype in POINTERS]
    found += [_select(target, *shape) for shape in _SELECTIONS]
    found += [_select(target, *shape, fixed=False) for shape in (_SELECTIONS[0], _SELECTIONS[-1])]
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)):
        for terms, apart in product((False, True), repeat=2):
            found.append(_finish(target, dtypes, 64, terms=terms, apart=apart))
        found.append(_open(target, dtypes, 64))
    for slots in (32, 128, 256, 512, finish.MAX_SLOTS):
        found += [
            _finish(target, (torch.float32, torch.float32), slots, terms=True, apart=True),
            _open(target, (torch.float32, torch.float32), slots),
        ]
    found += [_open(target, (torch.float32, torch.float32), slots, apart=True) for slots in (256, 512)]
    found.append(_finish(target, (torch.bfloat16, torch.bfloat16), 128, terms=True, apart=False, fixed=False))
    found.append(_open(target, (torch.bfloat16, torch.bfloat16), 128, fixed=False))
    for dtype, scaled in product((torch.float32, torch.bfloat16), (True, False)):
        found += [_rows(dtype, scaled=scaled, shift=shift) for shift in (False, True)]
    for dtype, scaled in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        found += _columns(dtype, scaled=scaled)
    totals = {"sums": "*fp32", "totals": "*fp64"}
    found.append(_variant("sums", sums._sums_kernel, totals, {"BLOCK": sums.BLOCK}, {"num_warps": 1}, short=True))
    return found


_SELECTIONS = (
    (256, 1, 64),
    (512, 4, 64),
    (512, 4, 128),
    (1024, 4, 64),
    (1024, 4, 256),
    (2048, 4, 256),
    (MAX_BLOCK, 4, 1024),
)
"""Sets, groups of a set read at a time, and slots."""
_KINDS: tuple[dict[str, bool], ...] = (
    {}, {"ragged": True}, {"even": False}, {"fixed": False}, {"split": True}, {"split": True, "ragged": True}
)  # fmt: skip


def _fused(
    target: str,
    dtype: torch.dtype,
    config: Config,
    *,
    terms: bool,
    statistics: bool = False,
    ragged: bool = False,
    even: bool = True,
    fixed: bool = True,
    split: bool = False,
) -> Variant:
    tma = target in TMA_TARGETS and even
    config = light(config) if ragged or not fixed else config
    config = config._replace(splits=2) if split else config
    name = POINTERS[dtype]
    constexprs = {
        "TERMS": terms,
        "FIXED": fixed,
        "RAGGED": ragged,
        "TOP": True,
        "BOTTOM": True,
        "STATISTICS": statistics,
        "EVEN_K": even,
        "USE_TMA": tma,
        "PERSISTENT": persistent(tma=tma, terms=terms, plain=fixed and not ragged),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLITS": config.splits,
        "PARTS": max(config.splits, config.parts),
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
    flags = {"tma": tma, "ragged": ragged, "uneven d": not even, "float keys": not fixed, "split": split}
    flags |= {"terms": terms, "statistics": statistics}
    return _variant(
        " ".join(["fused", name, shape, *(word for word, on in flags.items() if on)]),
        _topk_kernel,
        types | _VECTORS,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        integers=("stride_f", "stride_w", "d"),
        short=dtype == torch.bfloat16 and not (split and (terms or ragged)),
    )


def _winners(dtype: torch.dtype, fixed: bool, ragged: bool, *, statistics: bool) -> Variant:
    flags = {"TERMS": statistics, "FIXED": fixed, "RAGGED": ragged, "TOP": True, "BOTTOM": True}
    flags |= {"STATISTICS": statistics, "BLOCK_M": winners.TILE.block_m, "BLOCK_N": winners.TILE.block_n}
    words = {"ragged": ragged, "float keys": not fixed, "terms statistics": statistics}
    return _variant(
        " ".join(["winners", POINTERS[dtype], *(word for word, on in words.items() if on)]),
        winners._winners_kernel,
        {"dots": f"*{POINTERS[dtype]}"} | _VECTORS,
        flags,
        {"num_warps": winners.TILE.num_warps},
        integers=("stride",),
        short=dtype == torch.float32,
    )


def _select(target: str, block: int, parts: int, slots: int, *, fixed: bool = True) -> Variant:
    flags = {"TOP": True, "FIXED": fixed, "SLOTS": slots, "BLOCK": block, "PARTS": parts, "CHUNK": min(slots, CHUNK)}
    return _variant(
        f"select {block}x{parts} {slots}{'' if fixed else ' float keys'}",
        _select_kernel,
        _CANDIDATES | {"winners": "*i32", "chosen": "*i32"},
        flags,
        {"num_warps": warps_for(block, hip=target == "gfx942")},
        short=slots == 64,
    )


def _finish(
    target: str, dtypes: tuple[torch.dtype, torch.dtype], slots: int, *, terms: bool, apart: bool, fixed: bool = True
) -> Variant:
    room = finish.room_for(slots, int(apart))
    flags = {"TERMS": terms, "TOP": True, "FIXED": fixed, "APART": apart, "GROUP": 64, "SLOTS": slots}
    shape = finish.shape_for(room, hip=target == "gfx942")
    flags |= {"ROOM": room, "APART_ROOM": finish.MAX_APART, "BLOCK_C": shape["BLOCK_C"], "BLOCK_K": finish.BLOCK_K}
    words = {"terms": terms, "apart": apart, "float keys": not fixed}
    f, w = (POINTERS[dtype] for dtype in dtypes)
    return _variant(
        " ".join(["finish", f, w, str(slots), *(word for word, on in words.items() if on)]),
        finish._finish_kernel,
        {"F": f"*{f}", "W": f"*{w}"} | _RESULTS,
        flags,
        {"num_warps": shape["num_warps"], "enable_fp_fusion": False},
        integers=("stride_f", "stride_w", "d"),
        short=slots == 64 and not apart,
    )


def _open(
    target: str, dtypes: tuple[torch.dtype, torch.dtype], slots: int, *, apart: bool = False, fixed: bool = True
) -> Variant:
    flags = {"TERMS": True, "TOP": True, "FIXED": fixed, "GROUP": 64, "SLOTS": slots}
    f, w = (POINTERS[dtype] for dtype in dtypes)
    shape = finish.shape_for(finish.room_for(slots, int(apart)), hip=target == "gfx942")
    return _variant(
        f"open groups {f} {w} {slots} terms{' apart' if apart else ''}{'' if fixed else ' float keys'}",
        finish._open_kernel,
        {"F": f"*{f}", "W": f"*{w}"} | _RESULTS,
        flags | {"BLOCK_C": shape["BLOCK_C"], "BLOCK_K": finish.BLOCK_K},
        {"num_warps": shape["num_warps"], "enable_fp_fusion": False},
        integers=("stride_f", "stride_w", "d"),
        short=slots == 64 and f == w,
    )


def _rows(dtype: torch.dtype, *, scaled: bool, shift: bool) -> Variant:
    pointers = dict.fromkeys(("mean", "offset", "unit", "factor", "per_score", "error", "shift"), "*fp32")
    numbers = ("w_norm", "w_error", "w_power", "scale_max", "bias_max", "scale_mean", "bias_mean")
    numbers += ("summing", "rescoring", "lost")
    flags = {"COPY": scaled, "SCALED": scaled, "TERMS": True, "SHIFT": shift}
    return _variant(
        f"rows {POINTERS[dtype]}{' scaled' if scaled else ''}{' shift' if shift else ''}",
        rows._rows_kernel,
        {"F": f"*{POINTERS[dtype]}", "narrow": f"*{POINTERS[torch.float16 if scaled else dtype]}"}
        | pointers
        | dict.fromkeys(numbers, "fp32"),
        flags | {"UNITS": UNITS, "BLOCK": rows.BLOCK},
        {"num_warps": rows.NUM_WARPS},
        integers=("stride", "D"),
        short=not shift,
    )


def _columns(dtype: torch.dtype, *, scaled: bool) -> list[Variant]:
    W, narrow = f"*{POINTERS[dtype]}", f"*{POINTERS[torch.float16 if scaled else dtype]}"
    tile, options = {"ROWS": columns.ROWS, "BLOCK": columns.BLOCK}, {"num_warps": columns.NUM_WARPS}
    found = []
    if scaled:
        types = {"W": W, "norms": "*fp32", "peaks": "*fp32"}
        name = f"measure W {POINTERS[dtype]}"
        found.append(
            _variant(name, columns._measure_kernel, types, tile, options, integers=("stride", "d"), short=True)
        )
    types = {"W": W, "kept": "*i1", "narrow": narrow, "errors": "*fp32", "up": "fp32"}
    name = f"narrow W {POINTERS[dtype]}{' scaled' if scaled else ''}"
    flags = {"SCALED": scaled} | tile
    integers = ("stride", "d", "D")
    return [*found, _variant(name, columns._narrow_kernel, types, flags, options, integers=integers, short=True)]


_VECTORS = dict.fromkeys(("unit", "factor", "offset", "scale", "bias", "shift", "sums"), "*fp32") | {"winners": "*i32"}
_CANDIDATES = dict.fromkeys(("keys", "groups", "counts", "left_out"), "*i32")
_CANDIDATES |= {"per_score": "*fp32", "error": "*fp32"}
_RESULTS = _CANDIDATES | dict.fromkeys(("offset", "scale", "bias", "scores"), "*fp32")
_RESULTS |= {"apart": "*i32", "ids": "*i64", "flags": "*i32"}


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
