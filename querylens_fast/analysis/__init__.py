"""The reference's Python interface over this package's engine.

`common`, `jvp`, `vjp` and `run` carry the public names, arguments and result keys of HYU-NLP/query-lens, so that a
script written for it changes its imports and nothing else:

    from querylens_fast.analysis.common import ResidCache
    from querylens_fast.analysis.jvp import analyze_feature

They take the hooked models and sae-lens objects such a script holds, transformers models, and this package's own.
What they compute is the engine's; DIFFERENCES.md, beside this file, lists where the answers differ and why.
"""

from querylens_fast.dictionaries.feature_lists import Activation, Feature

__all__ = ["Activation", "Feature"]
