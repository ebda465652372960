"""A folder of results of a tiny model whose tokens are hard to show: markup, spaces, right-to-left, broken bytes."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models

import querylens_fast as ql
from querylens_fast.queries import Results
from querylens_fast.queries.views import Row

WORDS = (
    *("<unk>", "<eos>", "<pad>", "<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "שלום", " مرحبا"),
    *(
        "\u202eabc",
        "self",
        " self",
        "\n",
        "\n        ",
        "\t",
        "\ufffd",
        "\u0301x",
        "",
        "é",
        "日本",
        "&amp;",
        "·",
        "a/b?c#d",
    ),
)
VOCABULARY = (*WORDS, *(f" word{i}" for i in range(len(WORDS), 61)))
N_FEATURES = 70


def odd_model(folder: Path) -> ql.Model:
    """The tiny model in a folder, with the tokens of `VOCABULARY`."""
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return ql.load_model(folder)


def write_results(model: ql.Model, folder: Path, k: int = 12) -> None:
    """Signatures of two layers under four presets, with standard errors and layer terms, and neighbours."""
    ids = torch.randint(3, 61, (8, 6), generator=torch.Generator().manual_seed(1))
    transport = ql.fit_transport(
        model, ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), energy="probes", groups=2, progress=False
    )
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        values, keys = torch.randn(2, N_FEATURES, model.d_model, generator=generator)
        dictionary = ql.directions(values, keys=keys, layer=layer, name=f"sae{layer}")
        for preset in ("logit_lens_key", "query_lens_key", "logit_lens_value", "query_lens_value"):
            out = folder / f"sae{layer}.{preset}.parquet"
            bins = 9 if preset == "logit_lens_value" else 0
            ql.signatures(
                dictionary, model, preset=preset, transport=transport, k=k, out=out, progress=False, histogram=bins
            )
        ql.neighbours(dictionary, k=3, out=folder / f"neighbours-sae{layer}.parquet", progress=False)
    first_order = folder / "sae1.query_lens_value_approx.parquet"
    ql.signatures(
        dictionary, model, preset="query_lens_value_approx", transport=transport, layers=True, k=5, out=first_order,
        progress=False,
    )  # fmt: skip


def all_rows(found: Results, limit: int = 7, **options: object) -> list[Row]:
    """The rows of every page."""
    rows, after = [], None
    while True:
        page = found.search(after=after, limit=limit, **options)  # type: ignore[arg-type]
        rows += page.rows
        if page.next is None:
            return rows
        assert len(page.rows) == limit
        after = page.next
