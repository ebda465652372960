"""Load a causal language model, or adapt one that is already in memory.

`load_model` reads a transformers causal LM from a hub id or a local folder; `as_model` takes a transformers model or a
hooked model (transformer-lens, sae-lens) in memory, recognised by its attributes. Both compare the `Model`'s logits
with the source's own on a few tokens and raise `UnsupportedModelError` when they differ by more than rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from querylens_fast.models.families import from_transformers
from querylens_fast.models.hooked import from_hooked
from querylens_fast.models.model import Linearisation, Model, UnsupportedModelError
from querylens_fast.models.norms import at_least_float32

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


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


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
