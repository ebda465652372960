"""The reference's Python interface, translated into calls of `lens`.

`common`, `jvp`, `vjp` and `run` carry the public names, arguments and result keys of HYU-NLP/query-lens, so that a
script written for it changes its imports and nothing else:

    from querylens_fast.analysis.common import ResidCache
    from querylens_fast.analysis.jvp import analyze_feature

They take the hooked models and sae-lens objects such a script holds, transformers models, and this package's own.
docs/reference-users.md lists where results differ from the reference's, and why.
"""

from querylens_fast.dictionaries.feature_lists import Activation, Feature

__all__ = ["Activation", "Feature"]
