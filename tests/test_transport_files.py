"""Files of transports: what is written is what is read; damaged, foreign and hostile ones are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import querylens_fast as ql


def test_save_and_load(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    transport = ql.fit_transport(gpt2, sample, energy="probes", n_probes=4, progress=False)
    path = transport.save(tmp_path / "deep" / "t.safetensors")
    again = ql.load_transport(path)
    assert again.metadata == transport.metadata
    assert again.metadata["tokens_digest"] == sample.digest and again.n_valid == sample.n_valid == 32
    for pair in transport.matrices:
        assert torch.equal(again.matrices[pair], transport.matrices[pair])
        assert torch.equal(again.energies[pair], transport.energies[pair])
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_damaged_missing_and_foreign_files(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    path = ql.fit_transport(gpt2, sample, orders=("full",), progress=False).save(tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.load_transport(tmp_path / "none.safetensors")
    sample.save(tmp_path / "tokens.safetensors")
    with pytest.raises(ValueError, match="no transport"):
        ql.load_transport(tmp_path / "tokens.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ql.load_transport(path)


def test_one_group_is_the_file_of_before(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    path = ql.fit_transport(gpt2, sample, energy="probes", n_probes=4, progress=False).save(tmp_path / "t.safetensors")
    with safe_open(path, "pt") as file:
        pairs = [f"{side}.{order}" for side in ("value", "key") for order in ("full", "first_order")]
        assert set(file.keys()) == {"centre", *(f"{kind}.{p}" for kind in ("matrix", "energy") for p in pairs)}
        names = """format model fingerprint frame_fingerprint behaviour
            convention linearisation routing dtype n_layers d_model n_valid n_sequences
            tokens tokens_digest submodule through_norms energy n_probes seed querylens_fast torch transformers"""
        assert set(file.metadata()) == set(names.split())
    with pytest.raises(ValueError, match="keeps no groups of sequences: fit it with groups=8"):
        ql.load_transport(path).leave_one_out("value", "full", 2)


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t["matrix.value.full"][1].fill_(torch.nan), "matrix.value.full holds NaN or infinite"),
        (lambda t, m: t["group.key.full"][0, 0].fill_(torch.inf), "group.key.full holds NaN or infinite"),
        (lambda t, m: t["centre"].fill_(torch.nan), "centre holds NaN"),
        (lambda t, m: t.update(centre=torch.zeros(3)), r"centre is \[3\]; expected \[24\]"),
        (lambda t, m: t.update({"matrix.value.full": torch.zeros(7, 24, 23)}), r"expected \[7, 24, 24\]"),
        (lambda t, m: t.update({"matrix.value.full": torch.zeros(7, 24, 24).int()}), "holds torch.int32"),
        (lambda t, m: t.update({"matrix.value.half": torch.zeros(7, 24, 24)}), "which no transport has"),
        (lambda t, m: t.update({"other": torch.zeros(2)}), "which no transport has"),
        (lambda t, m: t.clear(), "holds no matrices"),
        (lambda t, m: m.update(n_layers="many"), "n_layers is 'many'"),
        (lambda t, m: m.update(n_layers=str(10**9)), "n_layers is '1000000000'"),
        (lambda t, m: m.update(d_model="1,2"), "d_model is '1,2'"),
        (lambda t, m: m.update(points="2,4,99"), r"points \[2, 4, 99\]"),
        (lambda t, m: m.update(group_n_valid="1,2"), "do not add up"),
        (lambda t, m: m.pop("fingerprint"), "has no fingerprint"),
        (lambda t, m: m.update(format="other"), "no transport"),
    ],
)
def test_hostile_transport_files(
    gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path, change: Callable[[dict, dict], None], message: str
) -> None:
    grouped = "group" in message
    path = ql.fit_transport(gpt2, sample, groups=1 + grouped, progress=False).save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        ql.load_transport(rewritten(path, change))
    assert "t.safetensors" in str(caught.value)


def test_no_cut_or_flipped_file_is_taken(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    """Cut anywhere, or with the header's bytes changed, a file is refused by name or read as it was."""
    whole = ql.fit_transport(gpt2, sample, sides=("value",), orders=("full",), progress=False)
    content = whole.save(tmp_path / "t.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(content[:8], "little")
    hostile = [content[: int(torch.randint(len(content), (), generator=generator))] for _ in range(30)]
    for at in torch.randint(header + 8, (60,), generator=generator).tolist():
        hostile.append(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
    for number, changed in enumerate([b"", *hostile]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(changed)
        try:
            found = ql.load_transport(path)
        except ValueError as error:
            assert path.name in str(error)
        else:
            assert torch.equal(found.matrices["value", "full"], whole.matrices["value", "full"])
