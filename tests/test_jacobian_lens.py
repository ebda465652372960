"""Jacobian-lens files: both ways, against transformer-lens's own reader and writer; what they cannot do is refused."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL, LAYERS
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app


@pytest.fixture(scope="module")
def fitted(gpt2: ql.Model, sample: ql.Tokens) -> ql.Transport:
    return ql.fit_transport(gpt2, sample, progress=False)


@pytest.fixture
def lens_file(tmp_path: Path) -> Path:
    """A lens as the reference implementation writes it."""
    path = tmp_path / "lens.pt"
    matrices = {layer: torch.randn(D_MODEL, D_MODEL).half() for layer in range(LAYERS - 1)}
    torch.save({"J": matrices, "n_prompts": 7, "source_layers": [0, 1], "d_model": D_MODEL}, path)
    return path


def test_export_is_read_by_transformer_lens(fitted: ql.Transport, tmp_path: Path) -> None:
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    lens = analysis.JacobianLens.load(str(ql.export_jacobian_lens(fitted, tmp_path / "lens.pt", torch.float32)))
    assert lens.source_layers == list(range(LAYERS - 1)) and lens.n_prompts == 5
    v = torch.randn(3, D_MODEL)
    for layer in lens.source_layers:
        ours = fitted.apply(v, "value", "full", 2 * layer + 2)
        assert torch.allclose(lens.transport(v, layer).double(), ours, rtol=1e-4, atol=1e-4)
    assert "all valid positions" in lens.metadata["averaging"]


def test_import_of_what_transformer_lens_writes(gpt2: ql.Model, tmp_path: Path) -> None:
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    matrices = {layer: torch.randn(D_MODEL, D_MODEL) for layer in range(LAYERS - 1)}
    lens = analysis.JacobianLens(matrices, n_prompts=2, d_model=D_MODEL, metadata={"corpus": "three lines"})
    lens.save(str(tmp_path / "lens.pt"))
    found = ql.import_jacobian_lens(tmp_path / "lens.pt", gpt2)
    for layer, matrix in matrices.items():
        assert torch.equal(found.matrix("value", "full", 2 * layer + 2), matrix.half().float())
    assert found.metadata["lens.corpus"] == "three lines" and "without the first 16" in found.metadata["averaging"]


def test_signatures_with_an_imported_lens(lens_file: Path, gpt2: ql.Model, tmp_path: Path) -> None:
    path = ql.import_jacobian_lens(lens_file, gpt2).save(tmp_path / "lens.safetensors")
    imported = ql.load_transport(path)
    assert imported.centre is None and imported.points == [2, 4, 6] and imported.metadata["n_prompts"] == "7"
    v = torch.randn(4, D_MODEL, dtype=torch.float64)
    jacobians = {**torch.load(lens_file, weights_only=True)["J"], LAYERS - 1: torch.eye(D_MODEL)}
    for layer, matrix in jacobians.items():
        found = ql.signatures(ql.directions(v, layer=layer), gpt2, transport=imported, k=3)
        expected = gpt2.unembed(gpt2.final_norm(v @ matrix.double().mT)).topk(3)
        assert torch.allclose(found.top_scores.double(), expected.values, atol=1e-4)


def test_round_trip(fitted: ql.Transport, gpt2: ql.Model, tmp_path: Path) -> None:
    path = ql.export_jacobian_lens(fitted, tmp_path / "lens.pt", dtype=torch.float64)
    again = ql.import_jacobian_lens(path, gpt2)
    for point in again.points:
        assert torch.equal(again.matrix("value", "full", point), fitted.matrix("value", "full", point))
    assert again.metadata["lens.tokens_digest"] == fitted.metadata["tokens_digest"]


def test_what_a_lens_cannot_do_is_named(lens_file: Path, gpt2: ql.Model, sample: ql.Tokens) -> None:
    imported = ql.import_jacobian_lens(lens_file, gpt2)
    middle = ql.directions(torch.randn(2, D_MODEL), layer=1, point="resid_mid")
    with pytest.raises(ValueError, match="no matrix for resid_mid of layer 1, only for resid_post of layer 0"):
        ql.signatures(middle, gpt2, transport=imported)
    vectors = ql.directions(torch.randn(2, D_MODEL), layer=1)
    with pytest.raises(ValueError, match="mean embedding, which the transport of Jacobian lens lens.pt does not know"):
        ql.signatures(vectors, gpt2, preset="query_lens_key", transport=imported)
    with pytest.raises(ValueError, match="holds value/full, not value/first_order"):
        ql.signatures(vectors, gpt2, preset="query_lens_value_approx", transport=imported)
    with pytest.raises(ValueError, match="energy='probes'"):
        ql.signatures(vectors, gpt2, transport=imported, stats="rel_var")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"jacobian_sum": {}, "n_done": 3}, "checkpoint of an unfinished fit"),
        ({"K": 1}, "is no Jacobian lens"),
        ({"J": {}}, "is no Jacobian lens"),
        ({"J": {"first": torch.eye(D_MODEL)}}, "expected layer numbers"),
        ({"J": {0: torch.eye(5)}}, r"is \[5, 5\] of torch.float32; expected floats \[24, 24\]"),
        ({"J": {0: torch.full((D_MODEL, D_MODEL), torch.nan)}}, "NaN or infinite"),
        ({"J": {LAYERS: torch.eye(D_MODEL)}}, r"has matrices for layers \[3\]"),
        ({"J": {0: torch.eye(D_MODEL)}, "metadata": {"target_layer": 1}}, "carries to layer 1, not to the last"),
        ({"J": {0: Path("x")}}, "damaged or truncated, or holds more than tensors"),
        ([1, 2], "is no Jacobian lens"),
        (torch.eye(3), "is no Jacobian lens"),
        ({"J": {float("inf"): torch.eye(D_MODEL)}}, "expected layer numbers"),
        ({"J": {0: torch.eye(D_MODEL), "0": torch.eye(D_MODEL)}}, "expected layer numbers, each once"),
        ({"J": {"9" * 9999: torch.eye(D_MODEL)}}, "expected layer numbers"),
        ({"J": {10**40: torch.eye(D_MODEL)}}, "has matrices for layers"),
        ({"J": {0: [[1.0]]}}, "is list; expected floats"),
        ({"J": {0: torch.eye(D_MODEL).to_sparse()}}, "holds more than tensors"),
        ({"J": {0: torch.eye(D_MODEL).cfloat()}}, "expected floats"),
        ({"J": {0: torch.eye(D_MODEL, device="meta")}}, "holds more than tensors"),
        ({"J": {0: torch.full((D_MODEL, D_MODEL), torch.inf)}}, "NaN or infinite"),
        ({"J": {0: torch.eye(D_MODEL)}, "metadata": [1]}, "its metadata is a list"),
        ({"J": {0: torch.eye(D_MODEL)}, "metadata": {"target_layer": torch.ones(2)}}, "carries to layer"),
        ({"J": {0: torch.eye(D_MODEL)}, "target_layer": 1}, "carries to layer 1"),
    ],
)
def test_files_that_are_no_lens_of_the_model(content: dict, message: str, gpt2: ql.Model, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(ValueError, match=message):
        ql.import_jacobian_lens(tmp_path / "lens.pt", gpt2)


def hostile_files() -> dict[str, bytes]:
    """Bytes that torch, zipfile or pickle answer with an exception of their own, or by running or waiting."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * (1 << 24))
    saved = io.BytesIO()
    torch.save({"J": {0: torch.eye(D_MODEL)}}, saved)
    whole = saved.getvalue()
    found = {"empty": b"", "text": b"J: 1", "zip bomb": archive.getvalue(), "runs code": pickle.dumps(print)}
    found |= {"pickle": pickle.dumps({"J": 1}), "deep pickle": b"\x80\x02" + b"]" * 10**5 + b"."}
    found |= {f"cut at {at}": whole[:at] for at in range(0, len(whole), 97)}
    for at in range(30, len(whole), 61):
        found[f"changed at {at}"] = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    return found


def test_hostile_bytes_are_refused_by_name(gpt2: ql.Model, tmp_path: Path) -> None:
    path = tmp_path / "lens.pt"
    for name, content in hostile_files().items():
        path.write_bytes(content)
        try:
            found = ql.import_jacobian_lens(path, gpt2)
        except ValueError as error:
            assert "lens.pt" in str(error), name
        else:
            assert torch.equal(found.matrix("value", "full", 2), torch.eye(D_MODEL)), name


def test_metadata_that_is_exponentially_long_is_cut(gpt2: ql.Model, tmp_path: Path) -> None:
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    content = {"J": {0: torch.eye(D_MODEL)}, "n_prompts": nested, "metadata": {"corpus": nested, "note": "x" * 10**6}}
    torch.save(content, tmp_path / "lens.pt")
    found = ql.import_jacobian_lens(tmp_path / "lens.pt", gpt2)
    assert all(len(value) <= 10_000 for value in found.metadata.values())


def test_missing_damaged_and_unwritable_files(fitted: ql.Transport, gpt2: ql.Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.import_jacobian_lens(tmp_path / "none.pt", gpt2)
    path = ql.export_jacobian_lens(fitted, tmp_path / "lens.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged"):
        ql.import_jacobian_lens(path, gpt2)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="could not be written"):
        ql.export_jacobian_lens(fitted, tmp_path / "folder")
    keys = ql.fit_transport(gpt2, torch.tensor([[3, 4]]), sides=("key",), orders=("full",), progress=False)
    with pytest.raises(ValueError, match="holds key/full, not value/full"):
        ql.export_jacobian_lens(keys, tmp_path / "keys.pt")


def test_the_command_converts_both_ways(fitted: ql.Transport, gpt2_folder: Path, tmp_path: Path) -> None:
    source, lens, back = fitted.save(tmp_path / "t.safetensors"), tmp_path / "lens.pt", tmp_path / "back.safetensors"
    runner = CliRunner()
    assert runner.invoke(app, ["convert-transport", str(source), str(lens)]).exit_code == 0
    refused = runner.invoke(app, ["convert-transport", str(lens), str(back)])
    assert refused.exit_code == 2 and "pass --model" in refused.output and not back.exists()
    done = runner.invoke(app, ["convert-transport", str(lens), str(back), "--model", str(gpt2_folder)])
    assert done.exit_code == 0 and "back.safetensors" in done.output.replace("\n", "")
    found = ql.load_transport(back).matrix("value", "full", 2).double()
    assert torch.allclose(found, fitted.matrix("value", "full", 2), rtol=2e-3, atol=2e-3)
