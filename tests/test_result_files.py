"""Results that are used: other readers, `search` and `show`, and their commands."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_large_results import K, dictionary_file
from tiny_models import D_MODEL
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.lens.parquet import ROW_GROUP


@pytest.fixture(scope="module")
def result(gpt2: ql.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signatures of more features than a row group holds, with token strings."""
    folder = tmp_path_factory.mktemp("result")
    dictionary = ql.load_dictionary(dictionary_file(folder / "d.safetensors", ROW_GROUP + 5000), layer=1)
    options = {"preset": "logit_lens_value", "k": K, "block_rows": 7000, "progress": False}
    ql.signatures(dictionary, gpt2, out=folder / "whole.parquet", **options)
    ql.signatures(dictionary, gpt2, out=folder / "few.jsonl", features="0:300", **options)
    ql.signatures(dictionary, gpt2, out=folder / "bare.parquet", features="0:300", token_strings=False, **options)
    return folder / "whole.parquet"


def test_the_file_is_read_lazily(result: Path) -> None:
    """Row groups of one size with the range of their features, and the same rows in every reader."""
    metadata = pq.read_metadata(result)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP, 5000]
    place = metadata.schema.to_arrow_schema().get_field_index("feature")
    statistics = metadata.row_group(1).column(place).statistics
    assert (statistics.min, statistics.max) == (ROW_GROUP, ROW_GROUP + 4999)
    wanted = pq.read_table(result, filters=[("feature", "==", 33_000)]).to_pylist()[0]
    assert wanted["feature_index"] == wanted["feature"] == 33_000 and len(wanted["top_tokens"]) == K
    row = pl.scan_parquet(result).filter(pl.col("feature") == 33_000).collect().to_dicts()[0]
    assert row == wanted
    relation = duckdb.sql(f"select * from read_parquet('{result}') where feature = 33000")
    assert dict(zip(relation.columns, relation.fetchall()[0], strict=True)) == wanted
    frame = pd.read_parquet(result, columns=["feature", "top_ids", "top_tokens"])
    assert frame.loc[33_000, "feature"] == 33_000 and list(frame.loc[33_000, "top_ids"]) == wanted["top_ids"]
    assert list(frame.loc[33_000, "top_tokens"]) == wanted["top_tokens"]
    assert pq.read_schema(result).field("top_ids").type == pa.list_(pa.field("element", pa.int32(), nullable=False))


@pytest.mark.parametrize("side", ["top", "bottom"])
def test_search_is_the_definition(result: Path, side: str) -> None:
    """Every feature whose signature holds the token, by its score: compared with a loop over all rows."""
    table = pq.read_table(result)
    ids, scores = (np.array(table[f"{side}_{what}"].to_pylist()) for what in ("ids", "scores"))
    rows, ranks = np.nonzero(ids == 17)
    found = [(float(scores[r, c]), r, c) for r, c in zip(rows, ranks, strict=True)]
    found.sort(key=lambda hit: (-hit[0] if side == "top" else hit[0], hit[1]))
    for token in (17, "w17"):
        hits = ql.search(result, token, side=side)
        assert len(hits) == len(found) > 100
        assert hits.features.tolist() == [r for _, r, _ in found]
        assert hits.scores.tolist() == [s for s, _, _ in found]
        assert hits.ranks.tolist() == [c for _, _, c in found]
        assert set(hits.token_ids.tolist()) == {17} and set(hits.layers.tolist()) == {1}
    assert ql.search(result, [17, 18], side=side, limit=3).features.shape == (3,)
    assert len(ql.search(result, [17, 18], side=side)) == len(found) + len(ql.search(result, 18, side=side))


def test_search_finds_leading_spaces(tmp_path: Path) -> None:
    """A token is found with and without its space, unless exact; from strings in the file, or through a tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {"cat": 0, " cat": 1, "cats": 2, "dog": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "dog")))
    config = transformers.GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = ql.as_model(transformers.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    dictionary = ql.directions(torch.randn(30, 8), layer=0)
    out = {strings: tmp_path / f"{strings}.parquet" for strings in (True, False)}
    for strings, path in out.items():
        options = {"token_strings": strings, "preset": "logit_lens_value", "k": 1, "out": path, "progress": False}
        ql.signatures(dictionary, model, **options)
    counts = [len(ql.search(out[True], token)) for token in (0, 1)]
    assert all(counts)
    for path, given in ((out[True], None), (out[False], model), (out[False], tokenizer)):
        assert len(ql.search(path, "cat", model=given)) == sum(counts)
        assert len(ql.search(path, "cat", exact=True, model=given)) == counts[0]
        assert len(ql.search(path, " cat", model=given)) == counts[1]
    with pytest.raises(ValueError, match="holds no token strings; pass model="):
        ql.search(out[False], "cat")


def test_show_and_search_of_every_kind_of_file(result: Path, gpt2: ql.Model, gpt2_folder: Path) -> None:
    whole, few, bare = (result.with_name(name) for name in ("whole.parquet", "few.jsonl", "bare.parquet"))
    rows = [ql.show(path, 7)[0] for path in (whole, few, bare)]
    assert rows[0]["top_tokens"] == rows[1]["top_tokens"] == gpt2.str_tokens(rows[0]["top_ids"])
    assert "top_tokens" not in rows[2]
    for model in (gpt2, gpt2_folder):
        assert ql.show(bare, 7, model=model)[0]["bottom_tokens"] == rows[0]["bottom_tokens"]
    assert ql.search(few, "w9").features.tolist() == ql.search(bare, 9).features.tolist()
    assert ql.search(bare, "w9", model=gpt2_folder).scores.tolist() == ql.search(bare, 9).scores.tolist()
    with pytest.raises(ValueError, match=r"feature 99999 is not in .*whole\.parquet"):
        ql.show(whole, 99_999)
    with pytest.raises(ValueError, match="side is 'left'"):
        ql.search(whole, 3, side="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'w9 w8' is not one token of the model"):
        ql.search(bare, "w9 w8", model=gpt2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.search(whole.with_name("nothing.parquet"), 3)


def test_the_commands(result: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["show", str(result), "33000"], env={"COLUMNS": "100"})
    row = ql.show(result, 33_000)[0]
    assert shown.exit_code == 0
    for token, score in zip(row["top_tokens"], row["top_scores"], strict=True):
        assert token in shown.stdout and f"{score:.4f}" in shown.stdout
    found = runner.invoke(app, ["search", str(result), "w17", "--limit", "2"], env={"COLUMNS": "100"})
    best = ql.search(result, "w17")
    assert found.exit_code == 0 and f"{len(best)} features have it among their top tokens" in found.stdout
    assert str(int(best.features[0])) in found.stdout and str(int(best.features[2])) not in found.stdout.split()
    none = runner.invoke(app, ["search", str(result), "W5"])
    assert none.exit_code == 2 and "no signature holds 'W5'; tokens like it: 'w5'" in none.output
    assert runner.invoke(app, ["search", str(result)]).exit_code == 2
    assert json.loads(pq.read_schema(result).metadata[b"querylens_fast"])["token_strings"] is True


def test_a_table_of_relations_is_not_searched(gpt2: ql.Model, tmp_path: Path) -> None:
    path = tmp_path / "relations.parquet"
    ql.downstream(ql.directions(torch.randn(9, D_MODEL), layer=1), gpt2, targets="unembed", out=path, progress=False)
    for asked in (lambda: ql.search(path, "w5"), lambda: ql.search(path, 5), lambda: ql.show(path, 3)):
        with pytest.raises(ValueError, match="is a table of 'downstream', not of signatures"):
            asked()
