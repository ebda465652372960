"""Files of an open folder of results: what comes, changes, goes, is not finished, or is no result."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from served_results import N_FEATURES, all_rows

import querylens_fast as ql
from querylens_fast.evaluation import feature_sample
from querylens_fast.lens.storage import open_sink, read_identity
from querylens_fast.queries import ResultGone
from querylens_fast.relations.tables import Block, rows, tabulate

VALUE = "sae0.query_lens_value.parquet"


def test_files_that_come_change_and_go_are_noticed(copied_results: Path) -> None:
    found = ql.open_results(copied_results)
    found.build_indexes()
    before = found.feature("sae0", 3)
    new = next(copied_results.glob("sae1.logit_lens_value.parquet"))
    moved = new.rename(copied_results / "moved.txt")
    assert "logit_lens_value" not in [s.preset for s in found.feature("sae1", 3).signatures]
    moved.rename(new)
    assert "logit_lens_value" in [s.preset for s in found.feature("sae1", 3).signatures]
    damaged = copied_results / "sae0.logit_lens_key.parquet"
    os.truncate(damaged, 1000)
    assert [s.preset for s in found.feature("sae0", 3).signatures] == [s.preset for s in before.signatures[1:]]
    assert [Path(s.file).name for s in found.skipped] == [damaged.name]
    for path in copied_results.glob("*.parquet"):
        path.unlink()
    with pytest.raises(LookupError, match="sae0"):
        found.feature("sae0", 3)
    assert found.dictionaries == ()


def test_a_file_of_the_same_size_and_time_is_another_one(copied_results: Path) -> None:
    """Overwritten in place and dated back, as some copying programs do."""
    import pyarrow.parquet as pq

    path = copied_results / VALUE
    table = pq.read_table(path).combine_chunks()
    table = table.replace_schema_metadata({b"querylens_fast": table.schema.metadata[b"querylens_fast"]})  # no seal
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, path, **plain)
    before, found = os.stat(path), ql.open_results(copied_results)
    first = [t.score for t in found.feature("sae0", 0).signatures[-1].top]
    names = table.column_names
    other = table.set_column(names.index("feature"), table.schema.field("feature"), table["feature"][::-1])
    with open(path, "r+b") as file:
        pq.write_table(other, file, **plain)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert [t.score for t in found.feature("sae0", N_FEATURES - 1).signatures[-1].top] == first


def test_a_jsonl_result_in_a_folder_is_named_as_left_out(copied_results: Path) -> None:
    for name in ("whole.jsonl", "whole.jsonl.run.json"):
        shutil.copy(Path(__file__).parent / "earlier" / name, copied_results)
    (copied_results / "notes.jsonl").write_text("{}\n")
    [skipped] = ql.open_results(copied_results).skipped
    assert Path(skipped.file).name == "whole.jsonl" and "written as Parquet are served" in skipped.reason


def test_results_of_an_earlier_version_are_of_the_same_dictionary(copied_results: Path) -> None:
    """Earlier versions recorded half of a dictionary's fingerprint."""
    import pyarrow.parquet as pq

    from querylens_fast.runs.sealed_parquet import write_sealed

    before = {d.slug: len(d.presets) for d in ql.open_results(copied_results).dictionaries}
    path = copied_results / "sae0.query_lens_key.parquet"
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"querylens_fast"])
    said["dictionary_fingerprint"] = said["dictionary_fingerprint"][:32]
    write_sealed(path, [table], table.schema.with_metadata({b"querylens_fast": json.dumps(said)}), {})
    assert {d.slug: len(d.presets) for d in ql.open_results(copied_results).dictionaries} == before


def test_a_named_file_that_goes_is_named(copied_results: Path) -> None:
    found = ql.open_results(copied_results / VALUE)
    assert found.feature("sae0", 1).signatures
    (copied_results / VALUE).unlink()
    with pytest.raises(ResultGone, match="query_lens_value"):
        found.feature("sae0", 1)


def test_a_run_under_way_is_answered_from_its_parts(served_model: ql.Model, served: Path, tmp_path: Path) -> None:
    identity, out = read_identity(served / "results" / VALUE), tmp_path / VALUE
    values, keys = torch.randn(2, N_FEATURES, served_model.d_model, generator=torch.Generator().manual_seed(0))
    dictionary = ql.directions(values, keys=keys, layer=0, name="sae0")
    sink = open_sink(out, None, identity, resume=True, token_strings=True, model=served_model)
    signatures = ql.signatures(dictionary, served_model, preset="logit_lens_value", features="0:30", k=12)
    sink.write(signatures, range(30))
    found = ql.open_results(tmp_path)
    [progress] = found.progress
    assert (progress.done, progress.total, progress.running) == (30, N_FEATURES, False)
    assert found.feature("sae0", 29).next is None
    assert not found.unindexed()


def test_samples_contexts_and_scores_are_found_by_their_dictionary(
    copied_results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sample, "ROW_GROUP", 16)
    identity = read_identity(copied_results / VALUE)
    tokens = ql.Tokens(torch.arange(3, 23).view(2, 10), torch.ones(2, 10, dtype=torch.bool))
    tokens.save(copied_results / "held-out.safetensors")
    n = N_FEATURES
    where = torch.stack([torch.zeros(n, dtype=torch.int64), torch.full((n,), -1)], 1)
    said = {
        key: identity[key] for key in ("model", "fingerprint", "dictionary", "dictionary_fingerprint", "kind", "layer")
    }
    sample = ql.FeatureSample(
        {**said, "what": "feature sample", "tokens": "corpus", "tokens_digest": tokens.digest, "n_valid": 20},
        torch.arange(n), torch.ones(n), torch.linspace(1, 2, n), torch.ones(n, dtype=torch.int64),
        torch.tensor([[2.0, 0.0]] * n), where, torch.where(where < 0, -1, 4), torch.where(where < 0, -1, 7),
        (torch.arange(n), torch.full((n,), 7), torch.arange(3, n + 3)),
    )  # fmt: skip
    sample.save(copied_results / "sample.parquet")
    methods = ["query_lens_key"] * n + ["query_lens_value"] * n
    table = rows(
        2 * n, source="a label", source_layer=0, source_id=torch.arange(n).repeat(2), method=methods,
        k=torch.full((2 * n,), 12), n_examples=torch.ones(2 * n, dtype=torch.int64),
        **{name: torch.linspace(0, 1, 2 * n, dtype=torch.float64) for name in ("input_score", "output_score")},
        string_coherence=None, embedding_coherence=None,
    )  # fmt: skip
    scored = {"what": "scores", "dictionaries": ["a label"], "fingerprints": [identity["dictionary_fingerprint"]]}
    column = table.column_names.index("output_score")
    unknown = [None if i >= n and i % 2 else x for i, x in enumerate(table["output_score"].to_pylist())]
    table = table.set_column(column, "output_score", pa.array(unknown, pa.float64()))
    tabulate([Block(n, lambda: table)], scored, out=copied_results / "scores.parquet", progress=False)
    found = ql.open_results(copied_results)
    info = found.dictionaries[0]
    assert info.sample == "corpus" and info.score_methods == ("query_lens_key", "query_lens_value")
    assert set(info.fields) == {"rel_var", "stable_k", "input_score", "output_score", "density", "maximum"}
    assert info.mean_scores["input_score query_lens_key"] == pytest.approx((n - 1) / (2 * n - 1) / 2)
    view = found.feature("sae0", 5)
    assert view.activity is not None and view.scores is not None
    assert view.activity.density == 0.25 and [(t.id, c) for t, c in view.activity.tokens] == [(7, 8)]
    later = found.feature("sae0", 40).activity
    assert later is not None and [(t.id, c) for t, c in later.tokens] == [(7, 43)]
    [context] = view.activity.contexts
    assert (context.token.id, context.before and [t.id for t in context.before]) == (7, [3, 4, 5, 6])
    assert context.after and [t.id for t in context.after] == [8, 9, 10, 11, 12]
    assert [(s.method, s.input_score, s.string_coherence) for s in view.scores] == [
        ("query_lens_key", pytest.approx(5 / (2 * n - 1)), None),
        ("query_lens_value", pytest.approx((n + 5) / (2 * n - 1)), None),
    ]
    [best] = found.search(order="-output_score", limit=1).rows
    assert (best.feature, best.values["output_score"]) == (n - 2, pytest.approx((2 * n - 2) / (2 * n - 1)))
    assert best.values["density"] == pytest.approx((n - 2) / 20)
    listed = all_rows(found, text="self", dictionary="sae0", side="value", order="-output_score")
    scores = [row.values["output_score"] for row in listed]
    assert scores == sorted(scores, reverse=True) and all(row.feature % 2 == 0 for row in listed) and listed


def test_what_is_no_result_is_refused_by_name(served_model: ql.Model, served: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt.*no \.parquet"):
        ql.open_results(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="there is no result"):
        ql.open_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ql.open_results(tmp_path / "nowhere.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="broken"):
        ql.open_results(tmp_path / "broken.parquet")
    dictionary = ql.directions(served_model.W_E[:5], layer=1)
    ql.token_features(dictionary, served_model, out=tmp_path / "other.parquet", k=2, progress=False)
    with pytest.raises(ValueError, match="is a table of"):
        ql.open_results(tmp_path / "other.parquet")
    found = ql.open_results(served / "results", tmp_path)
    assert sorted(Path(s.file).name for s in found.skipped) == ["broken.parquet", "other.parquet"]
