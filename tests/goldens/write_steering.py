"""Write ``steering.safetensors`` of every golden case with the reference's own functions, from a checkout of it.

    python tests/goldens/write_steering.py CHECKOUT_OF_HYU-NLP/query-lens

For the case's first features of two layers: what ``_get_completions_for_kl_val`` of ``data/write_feature_sample.py``
gives for KL 0 (clean), 0.25 and 0.5, at a fixed seed before each generation, on prompts of one length without padding.
"""

import ast
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_cases import CASES, golden
from test_hooked import hooked_model, sae_of

import querylens_fast as ql

SEED, PROMPTS, LENGTH, N_FEATURES = 3, 4, 5, 2
TARGETS = (0.0, 0.25, 0.5)


def functions(checkout: str) -> dict[str, Any]:
    """The steering functions of the reference, without the imports of its script."""
    source = (Path(checkout) / "data" / "write_feature_sample.py").read_text(encoding="utf-8")
    wanted = ("_kl_div", "_set_feature", "_sae_output", "_get_", "_make_", "_hooked_gen")
    body = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith(wanted)]
    names: dict[str, Any] = {"torch": torch, "np": np, "functools": functools, "HookedSAETransformer": Any}
    exec("from typing import *\n" + "\n".join(map(ast.unparse, body)), names)
    return names


@torch.no_grad()
def main(checkout: str) -> None:
    complete = functions(checkout)["_get_completions_for_kl_val"]
    for name in CASES:
        case = golden(name)
        hooked, tokens = hooked_model(case), ql.load_tokens(case.tokens_path)
        whole = tokens.valid_mask[:, :LENGTH].all(1)
        prompts = tokens.ids[whole][:PROMPTS, :LENGTH].contiguous()
        hooked.to_tokens = lambda given, **_: given  # the prompts are ids already
        found = {"prompts": prompts}
        for layer in case.layers[:2]:
            sae = sae_of(case, layer)
            for feature in case.features[:N_FEATURES]:
                alphas, ranks = [], []
                for target in TARGETS:
                    torch.manual_seed(SEED)
                    about = SimpleNamespace(feature=feature, layer=layer)
                    _, alpha, made = complete(hooked, prompts, about, target, sae=sae, max_new_tokens=20)
                    alphas.append(alpha or 0)
                    ranks.append(made["steered_mean_ranks" if target else "clean_mean_ranks"].double())
                found[f"layer{layer}.feature{feature}.alphas"] = torch.tensor(alphas[1:])
                found[f"layer{layer}.feature{feature}.ranks"] = torch.stack(ranks)
        save_file(found, str(case.folder / "steering.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
