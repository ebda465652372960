"""The one table of every product: whole or not at all, resumed after a kill, read by what people use."""

import errno
import json
from functools import partial
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import save_tiny_model

import querylens_fast as ql
from querylens_fast.relations.tables import Block, Categories, rows, tabulate, topk_rows
from querylens_fast.topk.api import streamed_topk

N, V, K = 10, 20, 3


class Product:
    """A product of four blocks that counts what it computes and fails where told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.F, self.W = torch.randn(N, 4, generator=generator), torch.randn(V, 4, generator=generator)
        self.computed: list[int] = []
        self.fails_at = fails_at
        self.blocks = [Block(len(ids), partial(self.rows, ids)) for ids in torch.arange(N).split(3)]

    def rows(self, ids: torch.Tensor) -> pa.Table:
        first = int(ids[0])
        if first == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.computed.append(first)
        found = streamed_topk(self.F[ids], self.W, K)
        return topk_rows(found, ids, source="a", source_layer=1, target="b", target_layer=None)


def test_rows_of_a_topk() -> None:
    product = Product()
    table = tabulate(product.blocks, {"what": "test"}).table().to_pylist()
    scores = product.F @ product.W.T
    assert len(table) == N * 2 * K
    for i, row in enumerate(table):
        source, rest = divmod(i, 2 * K)
        side, rank = ("top", "bottom")[rest // K], rest % K
        assert (row["source"], row["source_layer"], row["source_id"]) == ("a", 1, source)
        assert (row["target"], row["target_layer"], row["side"], row["rank"]) == ("b", None, side, rank)
        assert abs(row["score"] - float(scores[source, row["target_id"]])) < 1e-5
        expected = scores[source].sort(descending=side == "top").values[rank]
        assert abs(row["score"] - float(expected)) < 1e-5


def test_a_broken_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "table.parquet"
    broken = Product(fails_at=6)
    with pytest.raises(OSError, match="No space left"):
        tabulate(broken.blocks, {"what": "test"}, out=out, progress=False)
    assert not out.exists() and broken.computed == [0, 3]
    again = Product()
    found = tabulate(again.blocks, {"what": "test"}, out=out, progress=False)
    assert again.computed == [6, 9]
    assert found.table().to_pylist() == tabulate(Product().blocks, {"what": "test"}).table().to_pylist()
    assert [p.name for p in out.parent.iterdir()] == ["table.parquet"]
    done = Product()
    tabulate(done.blocks, {"what": "test"}, out=out, progress=False)
    assert done.computed == []
    straight = tmp_path / "straight.parquet"
    tabulate(Product().blocks, {"what": "test"}, out=straight, progress=False)
    assert straight.read_bytes() == out.read_bytes()


def test_another_runs_parts_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "table.parquet"
    with pytest.raises(OSError):
        tabulate(Product(fails_at=6).blocks, {"what": "test", "k": 3}, out=out, progress=False)
    with pytest.raises(FileExistsError, match=r"different: k\)"):
        tabulate(Product().blocks, {"what": "test", "k": 4}, out=out, progress=False)
    (tmp_path / "table.parquet.parts" / "part-000000000000.parquet").write_bytes(b"PAR1 cut off")
    again = Product()
    tabulate(again.blocks, {"what": "test", "k": 3}, out=out, progress=False)
    assert "part-000000000000.parquet' is damaged" in caplog.text and again.computed == [0, 6, 9]
    with pytest.raises(ValueError, match="nothing to compute"):
        tabulate([], {"what": "test"})


def test_read_by_other_libraries(tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    found = tabulate(Product().blocks, {"what": "test"}, out=out, progress=False)
    assert pq.ParquetFile(out).num_row_groups == 1
    best = duckdb.sql(f"select source_id, target_id from '{out}' where side = 'top' and rank = 0 order by 1").fetchall()
    frame = polars.read_parquet(out)
    assert frame.filter(side="top", rank=0).select("source_id", "target_id").rows() == best and len(best) == N
    pandas = found.pandas()
    assert list(pandas[(pandas.side == "top") & (pandas["rank"] == 0)].target_id) == [t for _, t in best]
    assert found.head(5).to_pylist() == found.table().to_pylist()[:5] == frame.head(5).to_dicts()
    assert ql.read_table(out).table(["score"]).num_columns == 1
    assert len(ql.read_table(out).head(10_000)) == len(found) == N * 2 * K
    text = pq.read_schema(out).metadata[b"querylens_fast"]
    assert json.loads(text) == ql.read_table(out).metadata == found.metadata
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="was not written by querylens_fast"):
        ql.read_table(tmp_path / "foreign.parquet")


def test_columns_of_many_kinds() -> None:
    table = rows(
        3,
        layer=torch.tensor([1, 2, 3]),
        other_layer=None,
        name=["x", "y", "x"],
        kind=Categories(["p", "q"], torch.tensor([1, 0, 1])),
        constant="c",
        number=2,
        weight=0.5,
    )
    assert table.column_names == ["layer", "other_layer", "name", "kind", "constant", "number", "weight"]
    assert table.to_pylist()[1] == {
        "layer": 2, "other_layer": None, "name": "y", "kind": "p", "constant": "c", "number": 2, "weight": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_precision_or_place_is_another_run(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    values = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    out = tmp_path / "r.parquet"
    ql.downstream(ql.directions(values, layer=1), ql.load_model(folder), targets="unembed", out=out, progress=False)
    place = "resid_post" if dtype == "bfloat16" else "resid_pre"
    again, model = ql.directions(values, layer=1, point=place), ql.load_model(folder, dtype=dtype)
    changed = "dictionary_fingerprint" if dtype == "float32" else "dtype"
    with pytest.raises(FileExistsError, match=rf"different: {changed}\)"):
        ql.downstream(again, model, targets="unembed", out=out, progress=False)


def test_a_mistake_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"

    def broken() -> pa.Table:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        tabulate([Block(1, broken)], {"what": "test"}, out=out, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_to_show(tmp_path: Path) -> None:
    found = tabulate([Block(1, lambda: pa.table({"a": [1, 2]}))], {}, out=tmp_path / "r.parquet", progress=False)
    assert len(found.head(0)) == 0 and found.head(0).column_names == ["a"] and len(found.head(5)) == 2
