"""Models: a causal language model as the few tensors the engine needs.

`load_model` reads a transformers causal LM from a hub id or a local folder; `as_model` takes one that is already in
memory, or a hooked model (transformer-lens, sae-lens) recognised by its attributes. Either becomes a `Model`: the
residual-stream blocks, the embedding, the final norm and the unembedding. `load_model` compares its own logits with
the model's on a few tokens and refuses a model it does not reproduce, so an unknown variation never passes silently.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from querylens_fast.blocks import Block, Masking
from querylens_fast.norms import Norm, at_least_float32

logger = logging.getLogger(__name__)

DTYPES = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


Linearisation = Literal["hand-written", "autodiff"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


class UnsupportedModelError(ValueError):
    """The model's architecture, or a variation of it, is not one this package reproduces."""


def parse_device(device: str | torch.device) -> torch.device:
    """A device that is there, from its name."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; expected cpu, cuda, cuda:1, …") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs; use another")
    return found


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name. Raises ValueError for an unknown one."""
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return DTYPES[str(dtype).lower().removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}") from None


@dataclass
class Model:
    """A causal language model, ready for the engine. Built by `load_model` or `as_model`, not by hand.

    W_E [V, D] is the raw embedding; the model multiplies it by ``embed_scale`` (Gemma: √d_model), so the token
    embedding of the paper is ``embed_scale · W_E``. W_U [V, D] is the unembedding's weight, b_U [V] its bias or None.
    ``convention`` says how to read scores: raw lm_head or a hooked model's processed weights. ``linearisation`` says
    whose Jacobians the walks take: those written out in `blocks` and `experts`, or autodiff's through the layers.
    """

    name: str
    architecture: str
    blocks: list[Block]
    final_norm: Norm
    W_E: Tensor
    W_U: Tensor
    b_U: Tensor | None
    embed_scale: float
    position_embedding: Tensor | None
    logit_softcap: float | None
    convention: str
    tokenizer: Any = None
    source: Any = field(default=None, repr=False)
    linearisation: Linearisation = "hand-written"

    @property
    def mixture_of_experts(self) -> bool:
        """Whether any layer routes its positions among experts; their Jacobians hold the routing fixed."""
        return any(block.mlp.routed for block in self.blocks)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.W_E.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.W_U.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's pad token, or None: then every position counts as valid."""
        return getattr(self.tokenizer, "pad_token_id", None)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [B, S, D] of ids [B, S], without positions (the reference's hook_embed)."""
        embedded = self.W_E[ids.to(self.device)]
        return embedded if self.embed_scale == 1.0 else embedded * self.embed_scale

    @torch.no_grad()
    def first_residual(self, ids: Tensor) -> Tensor:
        """The residual stream before layer 0, [B, S, D]."""
        embedded = self.embed(ids)
        return embedded if self.position_embedding is None else embedded + self.position_embedding[: ids.shape[1]]

    @torch.no_grad()
    def residuals(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(pre of each layer, mid of each layer, final), each [B, S, D], from a plain forward pass without a mask."""
        x, masking = self.first_residual(ids), self.masking(ids)
        pre, mid = [], []
        for block in self.blocks:
            pre.append(x)
            mid.append(x + block.attention(x, masking))
            x = mid[-1] + block.mlp(mid[-1])
        return pre, mid, x

    def masking(self, ids: Tensor, valid: Tensor | None = None) -> Masking:
        """How the tokens ids [B, S] attend; ``valid`` [B, S] bool hides padding."""
        return Masking(valid, (ids.shape[0], ids.shape[1]), self.device)

    @torch.no_grad()
    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of final residuals [..., D], soft cap included."""
        return self.cap(self.unembed(self.final_norm(residual)))

    def unembed(self, normed: Tensor) -> Tensor:
        """W_U x + b_U for normed residuals [..., D]."""
        return torch.nn.functional.linear(normed, self.W_U, self.b_U)

    def cap(self, logits: Tensor) -> Tensor:
        """The model's final logit soft cap, where it has one."""
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def str_tokens(self, ids: Iterable[int]) -> list[str]:
        """Each token id decoded on its own. Raises ValueError when the model was loaded without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(
                f"model {self.name!r} has no tokenizer, so token ids cannot be turned into strings; "
                "pass tokenizer='path-or-hub-id' to load_model"
            )
        known = self._known_tokens
        ids = [int(i) for i in ids]
        missing = sorted(set(ids) - known.keys())
        if missing:
            texts = self.tokenizer.batch_decode([[i] for i in missing], clean_up_tokenization_spaces=False)
            known.update(zip(missing, texts, strict=True))
        return [known[i] for i in ids]

    @cached_property
    def _known_tokens(self) -> dict[int, str]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model's shape and of samples of its weights, the same in every dtype it is loaded in."""
        digest = hashlib.sha256(f"{self.n_layers},{self.d_model},{self.vocab_size}".encode())
        weights = [self.W_E, self.W_U, self.b_U, self.position_embedding, *_own_weights(self.final_norm)]
        for block in self.blocks:
            for part in (block.attention, block.mlp):
                weights += part.matrices()
                for name, held in vars(part).items():
                    weights += [held] if name.startswith("b_") else _own_weights(held)
        for weight in weights:
            # A bias of zeros is none: hooked models keep such.
            if weight is None or (weight.ndim == 1 and not bool(weight.any())):
                continue
            matrix = weight[None] if weight.ndim == 1 else weight
            rows = torch.linspace(0, matrix.shape[0] - 1, 16, device=matrix.device).long()
            columns = torch.linspace(0, matrix.shape[1] - 1, 16, device=matrix.device).long()
            sample = matrix[rows][:, columns].to(torch.float32).to(torch.bfloat16).float().cpu()
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:32]


@torch.no_grad()
def load_model(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    linearisation: Linearisation = "hand-written",
) -> Model:
    """Load a transformers causal LM.

    Args:
        model: A hub id ("openai-community/gpt2") or a local folder with config.json and weights.
        device: Where its weights live.
        dtype: "float32", "float64", "bfloat16" or "float16".
        tokenizer: Another place to take the tokenizer from; by default the model's own.
        revision: A hub revision.
        linearisation: "hand-written" for the architectures in `layouts.FAMILIES`; "autodiff" differentiates the layers
            of any decoder of sequential blocks as transformers has them, at about twice the cost.

    Raises:
        FileNotFoundError: The folder or hub id cannot be had.
        UnsupportedModelError: The architecture is not supported (the message lists those that are).
    """
    import transformers

    from querylens_fast.layouts import from_transformers

    name, torch_dtype, place = str(model), parse_dtype(dtype), parse_device(device)
    _check_linearisation(linearisation)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: it is not a folder written by save_pretrained")
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        loading: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=torch_dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        source, info = loading
    except OSError as error:
        raise FileNotFoundError(
            f"model {name!r} could not be loaded: it is neither a readable local folder nor a hub id that can be "
            f"reached from here ({str(error).splitlines()[0]})"
        ) from error
    except ValueError as error:
        if "Unrecognized" in str(error) or "not recognized" in str(error) or "does not recognize" in str(error):
            raise UnsupportedModelError(f"model {name!r}: {str(error).splitlines()[0]}") from error
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ValueError(f"model {name!r}: its weights file is damaged or truncated ({error})") from error
        if isinstance(error, RuntimeError) and "size" in str(error):
            raise ValueError(f"model {name!r}: its weights do not have its config's shapes ({error})") from error
        raise
    missing = sorted(info["missing_keys"])
    if missing:
        more = "" if len(missing) <= 4 else f" and {len(missing) - 4} more"
        raise ValueError(
            f"model {name!r}: its files lack {', '.join(missing[:4])}{more}, for which random numbers would stand; "
            "fetch them again"
        )
    source = source.to(place).eval().requires_grad_(False)  # type: ignore[arg-type]
    loaded_tokenizer = _load_tokenizer(tokenizer or name, revision, required=bool(tokenizer))
    loaded = from_transformers(source, name, loaded_tokenizer, linearisation)
    check_finite_weights(loaded)
    check_reproduction(loaded, _logits_of(source))
    return loaded


def as_model(model: Any, tokenizer: Any = None, linearisation: Linearisation = "hand-written") -> Model:
    """A `Model` from one already in memory: a `Model`, a transformers causal LM or a hooked model.

    ``linearisation`` is that of `load_model`, for a transformers model.

    Raises:
        UnsupportedModelError: It is none of these.
    """
    from querylens_fast.hooked import from_hooked
    from querylens_fast.layouts import from_transformers

    _check_linearisation(linearisation)
    if isinstance(model, Model):
        return model
    state, known = _state_of(model), getattr(model, "_querylens_model", None)
    if known is not None and known[0] == (state, linearisation) and tokenizer in (None, known[1].tokenizer):
        return known[1]
    if hasattr(model, "cfg") and hasattr(model, "blocks") and hasattr(model, "W_E"):
        loaded, forward = from_hooked(model), model
    elif hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        name = getattr(model.config, "_name_or_path", "")
        if tokenizer is None and name:
            tokenizer = _load_tokenizer(name, None, required=False)
        loaded = from_transformers(model, name or type(model).__name__, tokenizer, linearisation)
        forward = _logits_of(model)
    else:
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; expected the result of load_model, a transformers causal LM, "
            "or a hooked model with .cfg, .blocks and .W_E"
        )
    with torch.no_grad():
        check_reproduction(loaded, forward)
    # Adapted once: a reference-style caller passes the same object for each feature.
    model._querylens_model = ((state, linearisation), loaded)
    return loaded


def _state_of(model: Any) -> list[tuple[Any, ...]] | None:
    """What changes when a module's weights do: trained, replaced, processed, moved or cast."""
    if not isinstance(model, torch.nn.Module):
        return None
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters()]


def _own_weights(norm: Any) -> list[Tensor | None]:
    """A norm's scale, as the checkpoint has it, and its bias; nothing for what is no norm."""
    if not isinstance(norm, Norm):
        return []
    return [norm.weight if norm.stored is None else norm.stored, norm.bias]


def _logits_of(source: Any) -> Callable[[Tensor], Tensor]:
    """A transformers model's plain forward pass."""

    def forward(ids: Tensor) -> Tensor:
        return source(input_ids=ids, use_cache=False).logits

    return forward


def _load_tokenizer(source: str | Path, revision: str | None, required: bool) -> Any:
    """The tokenizer at source, or None where the model has none: asking for token strings is then an error."""
    import transformers

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if required:
            raise FileNotFoundError(f"{str(folder)!r} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
        return None  # transformers would make up an empty tokenizer here
    try:
        return transformers.AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:
        if required:
            raise FileNotFoundError(f"no tokenizer could be loaded from {source!r}: {error}") from error
        if isinstance(error, OSError) and not folder.is_dir():
            return None  # a hub model without one
        # Taken for none, its pad token would count as text.
        raise ValueError(
            f"the tokenizer of {str(source)!r} cannot be read ({type(error).__name__}: {str(error)[:200]}); mend its "
            "files, or pass tokenizer='path-or-hub-id'"
        ) from error


def _check_linearisation(linearisation: str) -> None:
    if linearisation not in get_args(Linearisation):
        raise ValueError(f"linearisation is {linearisation!r}; expected 'hand-written' or 'autodiff'")


def check_finite_weights(model: Model) -> None:
    """Raise ValueError when a weight holds NaN or inf."""
    named = [("embedding", model.W_E), ("unembedding", model.W_U)]
    for layer, block in enumerate(model.blocks):
        for part in (block.attention, block.mlp):
            tensors = [(n, w) for n, w in vars(part).items() if isinstance(w, Tensor)]
            tensors = tensors or [(f"matrix {i} of {type(part).__name__}", w) for i, w in enumerate(part.matrices())]
            named += [(f"layer {layer} {n}", w) for n, w in tensors]
    for name, weight in named:
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"model {model.name!r}: {name} holds {count} NaN or infinite values; reload its weights")


def check_reproduction(model: Model, forward: Callable[[Tensor], Tensor]) -> None:
    """Compare our logits with the model's own on a few tokens.

    Raises:
        UnsupportedModelError: They differ by more than rounding, so some variation is not covered.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (2, 12), generator=generator).to(model.device)
    theirs = at_least_float32(forward(ids))
    ours = at_least_float32(model.logits(model.residuals(ids)[2]))
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-4}.get(model.dtype, 0.1)
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"model {model.name!r} ({model.architecture}) has a variation this package does not reproduce: its logits "
            f"differ from the model's own by {difference:.2e} (relative), more than the {tolerance:.0e} that rounding "
            "explains; please report its config"
        )
    if model.linearisation == "autodiff":
        logger.info("%s: linearised by autodiff through its own layers", model.name)
