"""Write this folder's dictionaries with eai-sparsify's own class: `pip install eai-sparsify`, then run this file."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

D, N = 8, 12
CASES = {
    "layers.1": {},
    "layers.1.mlp": {"transcode": True, "skip_connection": True},
    "layers.2": {"activation": "groupmax", "normalize_decoder": False},
}

torch.manual_seed(0)
for name, settings in CASES.items():
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=3, **settings))
    with torch.no_grad():
        for weight in coder.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
        if coder.cfg.normalize_decoder and not coder.cfg.transcode:
            coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(Path(__file__).parent / name)
        x = torch.randn(5, D)
        top = coder.encode(x)
        acts = torch.zeros(5, N).scatter(1, top.top_indices, top.top_acts)
        expected = {"x": x, "acts": acts, "output": coder(x).sae_out}
    save_file(expected, str(Path(__file__).parent / f"{name}.expected.safetensors"))
