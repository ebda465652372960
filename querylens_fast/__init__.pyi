"""The public names and the modules that hold them; `__init__.py` reads this file."""

from . import integrations
from .dictionaries.dictionary import Dictionary
from .dictionaries.feature_lists import Activation, Feature
from .dictionaries.load import load_dictionary
from .dictionaries.matrices import directions, neuron_dictionary
from .evaluation.evaluate import evaluate_signatures
from .evaluation.feature_sample import FeatureSample, feature_sample, load_feature_sample
from .evaluation.generation import SteeredText, steer
from .evaluation.output_score import Promoted, output_scores, promoted_tokens
from .evaluation.report import evaluation_report
from .evaluation.stability import Stability, stability
from .integrations.attribution_graph import annotate_graph
from .integrations.circuit_tracer import export_circuit_tracer
from .integrations.neuronpedia import export_neuronpedia
from .integrations.saedashboard import export_saedashboard
from .lens.compute import Signatures, scores_at, signatures
from .lens.presets import PRESETS, Preset, find_preset
from .lens.search import Hits, search, show
from .lens.storage import StoredSignatures, verify
from .models.errors import UnsupportedModelError
from .models.load import as_model, load_model
from .models.model import Model
from .models.tokens import Tokens, load_tokens
from .queries.results import open_results
from .relations.attention import attention_pairs
from .relations.channel_statistics import ChannelTest, channel_sweep, channel_test
from .relations.channels import subspace_channels
from .relations.flow import feature_chains, feature_flow, neighbours
from .relations.output_features import output_features
from .relations.profiles import attention_profiles
from .relations.readers import downstream, upstream
from .relations.tables import RelationTable, read_table
from .relations.vocabulary import token_features
from .relations.weight_lens import WeightLensThresholds, weight_descriptions, weight_lens
from .topk.api import TopK, streamed_topk
from .transport.fit import fit_transport
from .transport.jacobian_lens import export_jacobian_lens, import_jacobian_lens
from .transport.partial import Passage, fit_passage
from .transport.transport import Transport, load_transport

__version__: str
__all__ = [
    "Activation",
    "ChannelTest",
    "Dictionary",
    "Feature",
    "FeatureSample",
    "Hits",
    "Model",
    "PRESETS",
    "Passage",
    "Preset",
    "Promoted",
    "RelationTable",
    "Signatures",
    "Stability",
    "SteeredText",
    "StoredSignatures",
    "Tokens",
    "TopK",
    "Transport",
    "UnsupportedModelError",
    "WeightLensThresholds",
    "annotate_graph",
    "as_model",
    "attention_pairs",
    "attention_profiles",
    "channel_sweep",
    "channel_test",
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
    "find_preset",
    "fit_passage",
    "fit_transport",
    "import_jacobian_lens",
    "integrations",
    "load_dictionary",
    "load_feature_sample",
    "load_model",
    "load_tokens",
    "load_transport",
    "neighbours",
    "neuron_dictionary",
    "open_results",
    "output_features",
    "output_scores",
    "promoted_tokens",
    "read_table",
    "scores_at",
    "search",
    "show",
    "signatures",
    "stability",
    "steer",
    "streamed_topk",
    "subspace_channels",
    "token_features",
    "upstream",
    "verify",
    "weight_descriptions",
    "weight_lens",
]
