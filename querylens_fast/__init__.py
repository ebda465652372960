"""querylens_fast: token signatures for every feature of a sparse dictionary.

Query Lens (arXiv 2606.07617) names a feature of a sparse autoencoder or transcoder by tokens: its key vector by the
tokens that activate it, its value vector by the tokens it promotes, counting the indirect effects through the model's
other modules. This package does it for every feature of every layer.

    import querylens_fast as ql
    model = ql.load_model("openai-community/gpt2")
    transport = ql.fit_transport(model, ql.load_tokens("corpus.txt", model=model))
    ql.signatures(ql.load_dictionary("sae_layer6"), model, transport=transport, out="layer6.parquet")

Data goes one way: sources (`models`, `dictionaries`) → vectors → stream transition (`transport`, `lens.transitions`) →
readout (`lens.readouts`) → streamed top-k (`topk`) → `signatures` → files (`lens.storage`). docs/ has a page a topic.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
