"""A dictionary's identity covers all of its content, in whatever file it lies; identities of earlier versions count."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL

import querylens_fast as ql
from querylens_fast.runs.run_record import agree

N = 50
WEIGHTS = {
    "W_dec": torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(1)),
    "W_enc": torch.randn(D_MODEL, N, generator=torch.Generator().manual_seed(2)),
    "b_enc": torch.zeros(N),
    "b_dec": torch.zeros(D_MODEL),
}
CONFIG = {
    "architecture": "standard",
    "sae_lens_version": "6.0.0",
    "metadata": {"hook_name": "blocks.1.hook_resid_post"},
}


def sae(folder: Path, config: dict = CONFIG, **changed: torch.Tensor) -> ql.Dictionary:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in {**WEIGHTS, **changed}.items()}, str(folder / "sae_weights.safetensors"))
    (folder / "cfg.json").write_text(json.dumps(config))
    return ql.load_dictionary(folder)


def one_changed(name: str) -> torch.Tensor:
    """The tensor with feature 1 changed, which is none of the sixteen that fingerprints sample."""
    changed = WEIGHTS[name].clone()
    (changed[:, 1] if name == "W_enc" else changed[1]).add_(0.5)
    return changed


@pytest.mark.parametrize("changed", WEIGHTS)
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_a_changed_file_is_not_resumed(changed: str, name: str, gpt2: ql.Model, tmp_path: Path) -> None:
    options = {"preset": "logit_lens_value", "k": 3, "block_rows": 10, "progress": False, "out": tmp_path / name}
    ql.signatures(sae(tmp_path / "sae"), gpt2, **options)
    ql.signatures(sae(tmp_path / "sae"), gpt2, **options)
    with pytest.raises(FileExistsError, match="different: dictionary_fingerprint"):
        ql.signatures(sae(tmp_path / "sae", **{changed: one_changed(changed)}), gpt2, **options)


def test_what_running_it_needs_is_part_of_it(tmp_path: Path) -> None:
    settings = {"architecture": "topk", "k": 3}
    prints = [sae(tmp_path / "a", {**CONFIG, **more}).fingerprint for more in ({}, settings, {**settings, "k": 4})]
    assert len({p[:32] for p in prints}) == 1 and len(set(prints)) == 3


def test_the_same_numbers_are_the_same_dictionary(tmp_path: Path) -> None:
    expected = sae(tmp_path / "a").fingerprint
    assert sae(tmp_path / "b", {**CONFIG, "more": 1}).fingerprint == expected
    vectors = {k: v.bfloat16() for k, v in WEIGHTS.items() if k.startswith("W_")}
    save_file({k: v.contiguous() for k, v in vectors.items()}, str(tmp_path / "narrow.safetensors"))
    np.savez(tmp_path / "wide.npz", **{k: v.double().numpy() for k, v in vectors.items()})
    torch.save({k: v.float().T.contiguous() for k, v in vectors.items()}, tmp_path / "layer1.sae.pt")
    files = ("narrow.safetensors", "wide.npz", "layer1.sae.pt")
    held = ql.directions(vectors["W_dec"].float(), keys=vectors["W_enc"].T, layer=1)
    assert {ql.load_dictionary(tmp_path / f, layer=1).fingerprint for f in files} == {held.fingerprint} != {expected}


@pytest.mark.parametrize("earlier, now, same", [
    ("ab" * 16, f"{'ab' * 16}-{'0' * 32}", True),
    (["ab" * 16], [f"{'ab' * 16}-{'0' * 32}"], True),
    ({"of": "ab" * 16}, {"of": f"{'ab' * 16}-{'0' * 32}"}, True),
    (f"{'ab' * 16}-{'1' * 32}", f"{'ab' * 16}-{'0' * 32}", False),
    (f"{'ab' * 16}-{'0' * 32}", "ab" * 16, False),
    ("model", "model-b", False),
    (None, f"{'ab' * 16}-{'0' * 32}", False),
])  # fmt: skip
def test_fingerprints_of_earlier_versions(earlier: object, now: object, same: bool) -> None:
    assert agree(earlier, now) is same
