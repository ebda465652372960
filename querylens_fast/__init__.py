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

import importlib
from typing import TYPE_CHECKING, Any

from querylens_fast.dictionaries.dictionary import Dictionary, directions, neuron_dictionary
from querylens_fast.dictionaries.feature_lists import Activation, Feature
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.evaluate import evaluate_signatures
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample, load_feature_sample
from querylens_fast.evaluation.generation import SteeredText, steer
from querylens_fast.evaluation.output_score import Promoted, output_scores, promoted_tokens
from querylens_fast.evaluation.report import evaluation_report
from querylens_fast.evaluation.stability import Stability, stability
from querylens_fast.lens.compute import Signatures, scores_at, signatures
from querylens_fast.lens.presets import PRESETS, Preset, find_preset
from querylens_fast.lens.search import Hits, search, show
from querylens_fast.lens.storage import StoredSignatures, verify
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.load import as_model, load_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.relations.attention import attention_pairs
from querylens_fast.relations.channel_statistics import ChannelTest, channel_sweep, channel_test
from querylens_fast.relations.channels import subspace_channels
from querylens_fast.relations.flow import feature_chains, feature_flow, neighbours
from querylens_fast.relations.output_features import output_features
from querylens_fast.relations.profiles import attention_profiles
from querylens_fast.relations.readers import downstream, upstream
from querylens_fast.relations.tables import RelationTable, read_table
from querylens_fast.relations.vocabulary import token_features
from querylens_fast.relations.weight_lens import WeightLensThresholds, weight_descriptions, weight_lens
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobian_lens import export_jacobian_lens, import_jacobian_lens
from querylens_fast.transport.partial import Passage, fit_passage
from querylens_fast.transport.transport import Transport, load_transport

if TYPE_CHECKING:
    from querylens_fast import integrations as integrations
    from querylens_fast.integrations.circuit_tracer import annotate_graph, export_circuit_tracer
    from querylens_fast.integrations.neuronpedia import export_neuronpedia
    from querylens_fast.integrations.saedashboard import export_saedashboard
    from querylens_fast.queries.results import open_results

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Activation",
    "ChannelTest",
    "Dictionary",
    "Feature",
    "FeatureSample",
    "Promoted",
    "SteeredText",
    "Hits",
    "Model",
    "Passage",
    "Preset",
    "RelationTable",
    "Signatures",
    "Stability",
    "StoredSignatures",
    "TopK",
    "WeightLensThresholds",
    "Tokens",
    "Transport",
    "UnsupportedModelError",
    "annotate_graph",
    "as_model",
    "attention_pairs",
    "attention_profiles",
    "channel_sweep",
    "channel_test",
    "weight_descriptions",
    "directions",
    "downstream",
    "evaluate_signatures",
    "evaluation_report",
    "export_circuit_tracer",
    "export_jacobian_lens",
    "export_neuronpedia",
    "export_saedashboard",
    "feature_chains",
    "feature_flow",
    "feature_sample",
    "load_feature_sample",
    "output_scores",
    "promoted_tokens",
    "steer",
    "find_preset",
    "fit_passage",
    "fit_transport",
    "import_jacobian_lens",
    "load_dictionary",
    "load_model",
    "load_tokens",
    "load_transport",
    "neighbours",
    "neuron_dictionary",
    "open_results",
    "output_features",
    "read_table",
    "scores_at",
    "search",
    "show",
    "signatures",
    "stability",
    "streamed_topk",
    "subspace_channels",
    "token_features",
    "upstream",
    "verify",
    "weight_lens",
]

_INTEGRATIONS = {
    "annotate_graph": "circuit_tracer",
    "export_circuit_tracer": "circuit_tracer",
    "export_neuronpedia": "neuronpedia",
    "export_saedashboard": "saedashboard",
}


def __getattr__(name: str) -> Any:
    """Integrations are imported when they are asked for."""
    if name == "integrations":
        return importlib.import_module("querylens_fast.integrations")
    if name in _INTEGRATIONS:
        return getattr(importlib.import_module(f"querylens_fast.integrations.{_INTEGRATIONS[name]}"), name)
    if name == "open_results":
        return importlib.import_module("querylens_fast.queries.results").open_results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
