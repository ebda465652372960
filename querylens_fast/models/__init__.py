"""A causal language model as tensors and layers: its residual stream, embedding, final norm and unembedding."""

from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.load import as_model, load_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens

__all__ = ["Model", "Tokens", "UnsupportedModelError", "as_model", "load_model", "load_tokens"]
