"""Small dictionaries in every format of the field, written in its exact layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

N, D = 12, 8


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Case:
    """A small dictionary in one format.

    ``write`` makes the files under the repository's snapshot; ``path`` is what a user names, ``folder_name`` what
    sae-lens's ``loader`` is told. ``points`` are where our values and keys act.
    """

    format: str
    repo: str
    folder_name: str
    path: str
    loader: str
    write: Callable[[Path], None]
    points: tuple[int | None, int | None]
    overrides: dict[str, Any] = field(default_factory=lambda: {"d_in": D, "d_sae": N})
    encodes: bool = True


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def linear(prefix: str = "") -> dict[str, Tensor]:
    """A pair of torch.nn.Linear layers."""
    return {
        f"encoder{prefix}.weight": randn(N, D),
        f"encoder{prefix}.bias": randn(N),
        f"decoder{prefix}.weight": randn(D, N),
        f"decoder{prefix}.bias": randn(D),
    }


def sae(enc: tuple[int, int] = (D, N), dec: tuple[int, ...] = (N, D), lower: bool = False) -> dict[str, Tensor]:
    W = "w" if lower else "W"
    return {f"{W}_enc": randn(*enc), f"{W}_dec": randn(*dec), "b_enc": randn(N), "b_dec": randn(D)}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(path))
    elif path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    else:
        torch.save(tensors, path)


def sae_lens_folder(root: Path) -> None:
    save(root / "v5/sae_weights.safetensors", sae())
    # As versions before 6 wrote it.
    old = {
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "hook_point": "blocks.2.hook_resid_pre",
        "architecture": "standard",
    }
    write_json(root / "v5/cfg.json", {**old, "model_name": "gpt2-small", "normalize_activations": "none"})


def gemma_scope(folder: str) -> Callable[[Path], None]:
    return lambda root: save(root / folder / "params.npz", {**sae(), "threshold": randn(N).abs()})


def gemma_scope_2(folder: str, file: str = "params.safetensors", skip: bool = False, layers: int = 0):
    def write(root: Path) -> None:
        tensors = {**sae(dec=(N, layers, D) if layers else (N, D), lower=True), "threshold": randn(N).abs()}
        if skip:
            tensors["affine_skip_connection"] = randn(D, D)
        save(root / folder / file if file != ".safetensors" else root / f"{folder}.safetensors", tensors)
        if file != ".safetensors":
            write_json(
                root / folder / "config.json",
                {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": skip},
            )

    return write


def llama_scope(root: Path) -> None:
    save(root / "L3R/checkpoints/final.safetensors", {k: v.bfloat16() for k, v in linear().items()})
    hook = "blocks.3.hook_resid_post"
    config = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "d_sae": N, "jump_relu_threshold": 0.5}
    write_json(root / "L3R/hyperparams.json", {**config, "dataset_average_activation_norm": {"in": 3.0}})


def llama_scope_r1(root: Path) -> None:
    save(root / "800M/L3R/sae_weights.safetensors", {**linear(), "log_jumprelu_threshold": randn(N)})
    config = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post", "d_model": D}
    write_json(root / "800M/L3R/config.json", {**config, "expansion_factor": N / D})


def sparsify(root: Path) -> None:
    tensors = {"encoder.weight": randn(N, D), "encoder.bias": randn(N), "W_dec": randn(N, D), "b_dec": randn(D)}
    save(root / "layers.3/sae.safetensors", tensors)
    write_json(root / "layers.3/cfg.json", {"d_in": D, "num_latents": N, "k": 4, "activation": "topk"})


def dictionary_learning(kind: str) -> Callable[[Path], None]:
    if kind == "JumpReluAutoEncoder":
        tensors = {**sae(), "threshold": randn(N).abs()}
    elif kind == "GatedAutoEncoder":
        tensors = {**linear(), "r_mag": randn(N), "gate_bias": randn(N), "mag_bias": randn(N), "decoder_bias": randn(D)}
        del tensors["encoder.bias"], tensors["decoder.bias"]
    else:
        tensors = {**linear(), "bias" if kind == "AutoEncoder" else "b_dec": randn(D)}
        del tensors["decoder.bias"]
    if kind == "BatchTopKSAE":
        tensors |= {"k": torch.tensor(4), "threshold": torch.tensor(0.25)}

    def write(root: Path) -> None:
        save(root / "trainer_0/ae.pt", tensors)
        trainer = {"dict_class": kind, "layer": 3, "activation_dim": D, "dict_size": N, "lm_name": "EleutherAI/p"}
        trainer |= {"submodule_name": "resid_post_layer_3"} | ({"k": 4} if "TopK" in kind else {})
        write_json(root / "trainer_0/config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})

    return write


def circuit_tracer(root: Path) -> None:
    save(root / "layer_3.safetensors", sae(enc=(N, D)))
    (root / "config.yaml").write_text(
        "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    (root / "wandb-config.yaml").write_text(
        f"d_model: {{value: {D}}}\nd_feature: {{value: {N}}}\nbatch_size: {{value: 16}}\n"
    )


def cross_layer(root: Path) -> None:
    save(root / "W_enc_3.safetensors", {"W_enc_3": randn(N, D), "b_enc_3": randn(N), "b_dec_3": randn(D)})
    save(root / "W_dec_3.safetensors", {"W_dec_3": randn(N, 5, D)})
    (root / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )


RES, TRANSCODER = (8, 8), (8, 7)
SCOPE = "layer_3/width_16k/average_l0_71"
SCOPE_2 = "layer_3_width_16k_l0_big"
CLT_2 = f"clt/width_262k_l0_big_affine/params_{'layer_3'}"
CASES = [
    Case("sae-lens", "jbloom/GPT2", "v5", "v5", "sae_lens", sae_lens_folder, (4, 4)),
    Case(
        "Qwen-Scope",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5",
        "layer3.sae.pt",
        "layer3.sae.pt",
        "qwen_scope",
        lambda root: save(root / "layer3.sae.pt", sae(enc=(N, D), dec=(D, N))),
        RES,
    ),
    *(
        Case(
            "Gemma Scope",
            f"google/gemma-scope-2b-pt-{site}",
            SCOPE,
            f"{SCOPE}/params.npz",
            loader,
            gemma_scope(SCOPE),
            points,
            {"d_in": D, "d_sae": N} | ({"d_out": D} if site == "transcoders" else {}),
            encodes=site != "att",  # sae-lens expects hook_z by heads
        )
        for site, loader, points in (
            ("res", "gemma_2", RES),
            ("mlp", "gemma_2", (8, None)),
            ("att", "gemma_2", (None, None)),
            ("transcoders", "gemma_2_transcoder", TRANSCODER),
        )
    ),
    *(
        Case(
            "Gemma Scope 2",
            "google/gemma-scope-2-1b-pt",
            f"{site}/{SCOPE_2}",
            f"{site}/{SCOPE_2}/params.safetensors",
            "gemma_3",
            gemma_scope_2(f"{site}/{SCOPE_2}", skip="transcoder" in site),
            points,
        )
        for site, points in (
            ("resid_post", RES),
            ("resid_post_all", RES),
            ("mlp_out", (8, None)),
            ("attn_out", (None, None)),
            ("transcoder", TRANSCODER),
        )
    ),
    Case(
        "Gemma Scope 2 cross-layer transcoder",
        "google/gemma-scope-2-1b-pt",
        CLT_2,
        f"{CLT_2}.safetensors",
        "gemma_3",
        gemma_scope_2(CLT_2, ".safetensors", skip=True, layers=5),
        (None, 7),
        encodes=False,
    ),
    Case("Llama Scope", "fnlp/Llama3_1-8B", "L3R", "L3R", "llama_scope", llama_scope, RES, encodes=False),
    Case(
        "Llama Scope R1",
        "fnlp/R1",
        "800M/L3R",
        "800M/L3R",
        "llama_scope_r1_distill",
        llama_scope_r1,
        RES,
        encodes=False,
    ),
    # sae-lens does not subtract b_dec where the decoder is normalised; sparsify does. tests/test_coders.py runs these.
    Case("sparsify", "EleutherAI/sae", "layers.3", "layers.3", "sparsify", sparsify, RES, {"dtype": "float32"}, False),
    *(
        Case(
            "dictionary_learning",
            "canrager/lm_sae",
            "trainer_0",
            "trainer_0",
            "dictionary_learning_1",
            dictionary_learning(kind),
            RES,
            {},
        )
        for kind in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder")
    ),
    Case(
        "circuit-tracer transcoder",
        "mwhanna/qwen3-4b-transcoders",
        "layer_3.safetensors",
        "layer_3.safetensors",
        "mwhanna_transcoder",
        circuit_tracer,
        TRANSCODER,
        {},
    ),
    Case(
        "circuit-tracer cross-layer transcoder",
        "mntss/clt-gemma-2-2b-2.5M",
        "3",
        "W_enc_3.safetensors",
        "mntss_clt_layer_transcoder",
        cross_layer,
        (None, 7),
        {},
        encodes=False,
    ),
    Case(
        "linear layers",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        "deepseek_r1",
        lambda root: save(root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", linear()),
        (40, 40),
        {"d_in": D, "d_sae": N, "dtype": "float32"},
    ),
    Case(
        "linear layers",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "goodfire",
        lambda root: save(root / "Llama-3.1-8B-Instruct-SAE-l19.pth", linear("_linear")),
        (40, 40),
    ),
]
