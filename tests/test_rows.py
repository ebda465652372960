"""Rows read in part from files are the file's rows, whatever is asked; reading ahead changes nothing but the time."""

import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import querylens_fast as ql
from querylens_fast.dictionaries.prefetch import prefetch
from querylens_fast.dictionaries.rows import FileRows, MemoryRows, SummedRows
from querylens_fast.dictionaries.tensor_files import open_tensors

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def stored(folder: Path, matrix: torch.Tensor, kind: str) -> Path:
    """A file with the matrix and something before it, so that no offset is round."""
    path = folder / f"m.{kind}"
    before = torch.zeros(3, dtype=matrix.dtype)
    if kind == "safetensors":
        save_file({"a": before, "m": matrix}, str(path))
    elif kind == "pt":
        torch.save({"a": before, "m": matrix}, path)
    else:
        np.savez(path, a=before.numpy(), m=matrix.numpy())
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_of_any_file(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["safetensors", "npz", "pt"]))
    dtype = data.draw(st.sampled_from(DTYPES if kind != "npz" else DTYPES[:3]))
    n, D = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 7))
    transposed = data.draw(st.booleans())
    ids = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=30)), dtype=torch.int64)
    matrix = torch.randn(n, D).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Path(folder), (matrix.mT if transposed else matrix).contiguous(), kind)
        tensor = open_tensors(path)[0]["m"]
        rows = tensor.rows(transposed)
        assert isinstance(rows, MemoryRows if kind == "pt" else FileRows) and rows.shape == (n, D)
        a, b = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
        for asked in (ids, slice(a, b), slice(None)):
            found = rows.read(asked)
            assert found.dtype == dtype
            assert torch.equal(found.double(), matrix.double()[asked])
        assert torch.equal(tensor.read().double(), (matrix.mT if transposed else matrix).double())


@pytest.mark.parametrize("how", ["compressed", "fortran", "old torch file"])
def test_what_cannot_be_read_in_part_is_read_whole(tmp_path: Path, how: str) -> None:
    matrix = torch.randn(6, 4)
    path = tmp_path / ("m.pt" if "torch" in how else "m.npz")
    if how == "compressed":
        np.savez_compressed(path, m=matrix.numpy())
    elif how == "fortran":
        np.savez(path, m=np.asfortranarray(matrix.numpy()))
    else:
        torch.save({"m": matrix}, path, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(path)
    assert torch.equal(open_tensors(path)[0]["m"].rows(False).read(torch.tensor([5, 1])), matrix[[5, 1]])


def test_sums_over_the_middle_axis() -> None:
    tensor = torch.randn(5, 3, 4)
    rows = SummedRows(MemoryRows(tensor.flatten(1)), 3)
    assert rows.shape == (5, 4)
    assert torch.allclose(rows.read(torch.tensor([4, 0])), tensor.sum(1)[[4, 0]])


class Watched:
    """Rows that say who read what."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.rows, self.shape = MemoryRows(matrix), (matrix.shape[0], matrix.shape[1])
        self.reads: list[tuple[str, list[int]]] = []
        self.read_next = threading.Event()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        background = threading.current_thread() is not threading.main_thread()
        self.reads.append(("ahead" if background else "asked", ids.tolist()))
        if background:
            self.read_next.set()
        if 99 in ids.tolist():
            raise OSError("the disk is gone")
        return self.rows.read(ids)


def watched_dictionary(n: int = 200) -> tuple[ql.Dictionary, Watched]:
    dictionary = ql.directions(torch.randn(n, 3), layer=0)
    rows = Watched(dictionary.values(slice(None)))
    dictionary.value_rows = rows  # type: ignore[assignment]
    return dictionary, rows


def test_prefetch_reads_the_next_block_in_the_background() -> None:
    dictionary, rows = watched_dictionary(20)
    blocks = list(torch.arange(20).split(8))
    for i, (ids, vectors) in enumerate(prefetch(dictionary, "value", blocks)):
        assert ids is blocks[i] and torch.equal(vectors, rows.rows.matrix[ids])
        if i + 1 < len(blocks):
            assert rows.read_next.wait(10), "nothing was read while the block is worked on"
            rows.read_next.clear()
    assert rows.reads == [("asked", blocks[0].tolist()), *(("ahead", b.tolist()) for b in blocks[1:])]
    assert list(prefetch(dictionary, "value", [])) == []


def test_prefetch_raises_a_background_error_at_its_own_block() -> None:
    dictionary, _ = watched_dictionary()
    reader = prefetch(dictionary, "value", [torch.tensor([1]), torch.tensor([2]), torch.tensor([99])])
    next(reader)
    next(reader)
    with pytest.raises(OSError, match="the disk is gone"):
        next(reader)
    dictionary.key_rows = None
    with pytest.raises(ValueError, match="holds no key vectors"):
        next(prefetch(dictionary, "key", [torch.tensor([0])]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
@pytest.mark.parametrize("transposed", [False, True])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str, transposed: bool) -> None:
    """A file of 64 MiB read in blocks of 1 MiB adds a few MiB to the memory that is not of mapped files."""

    def anonymous_mib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    n, D = 1 << 18, 64
    path = stored(tmp_path, torch.zeros((D, n) if transposed else (n, D)), kind)
    rows = open_tensors(path)[0]["m"].rows(transposed)
    blocks = list(torch.arange(n).split(4096))
    before, peak = anonymous_mib(), 0.0
    dictionary = ql.directions(torch.zeros(1, D), layer=0)
    dictionary.n_features, dictionary.value_rows = n, rows
    for _, vectors in prefetch(dictionary, "value", blocks):
        assert vectors.shape == (4096, D)
        peak = max(peak, anonymous_mib())
    assert peak - before < 16
