"""Every format of the table, in its exact layout: our sliced reading against sae-lens's own loader of the same file."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_cases import CASES, Case, D, N, gemma_scope, randn, sae, save
from torch import Tensor

import querylens_fast as ql
from querylens_fast.dictionaries.formats import ANY_FILE, FORMATS
from querylens_fast.dictionaries.rows import FileRows, SummedRows

pytest.importorskip("sae_lens")
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAE


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's files with byte ranges: sae-lens asks for headers of safetensors files over HTTP."""

    roots: dict[str, Path] = {}

    def do_GET(self) -> None:
        repo, file = self.path.lstrip("/").split("/resolve/main/")
        content = (self.roots[repo] / file).read_bytes()
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub cache and a hub of the files a case writes; gives the folder they are to be written to."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")

    def root_of(repo: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        Hub.roots[repo] = folder / "snapshots" / ("0" * 40)
        Hub.roots[repo].mkdir(parents=True)
        return Hub.roots[repo]

    yield root_of
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:This loads the CLT layer")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{c.repo}-{c.folder_name}".replace(" ", "_"))
def test_a_format_is_read_as_sae_lens_reads_it(case: Case, snapshot: Callable[[str], Path]) -> None:
    root = snapshot(case.repo)
    case.write(root)
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[case.loader]
    cfg, state, _ = load(case.repo, case.folder_name, "cpu", False, dict(case.overrides))
    ours = ql.load_dictionary(root / case.path)
    assert (ours.n_features, ours.d_model) == (N, D)
    assert ours.layer == int((cfg.get("hook_name") or cfg["hook_point"]).split(".")[1])
    assert (ours.value_point, ours.key_point) == case.points
    assert ours.kind == ("transcoder" if "transcoder" in cfg["architecture"] else "sae")
    if case.format == "sparsify":
        assert state["W_dec"].shape == (D, N)  # sae-lens turns sparsify's W_dec, which is [n, D] in the file already
        state["W_dec"] = state["W_dec"].T
    for mine, theirs in ((ours.values(slice(None)), state["W_dec"]), (ours.keys(slice(None)), state["W_enc"].T)):
        assert torch.equal(mine.float(), theirs.float())
    chosen = torch.tensor([7, 2, 3])
    assert torch.equal(ours.keys(chosen).float(), state["W_enc"].T[chosen].float())
    assert isinstance(ours.key_rows, FileRows) or not case.path.endswith((".npz", ".safetensors"))
    if case.encodes:
        x = randn(4, D)
        assert torch.allclose(ours.coder.encode(x), sae_lens_object(cfg, state).encode(x), atol=1e-5)


def sae_lens_object(cfg: dict[str, Any], state: dict[str, Tensor]) -> SAE:
    cfg = loaders.handle_config_defaulting(cfg)
    kind = SAE.get_sae_class_for_architecture(cfg["architecture"])
    made = kind(SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg))
    state = dict(state)
    made.process_state_dict_for_loading(state)
    made.load_state_dict(state)
    return made


def test_a_release_is_read_in_part(snapshot: Callable[[str], Path]) -> None:
    """A release of sae-lens's directory in the hub cache: its own file is read, not sae-lens's copy in memory."""
    sae_id = "layer_3/width_16k/average_l0_14"
    root = snapshot("google/gemma-scope-2b-pt-res")
    gemma_scope(sae_id)(root)
    dictionary = ql.load_dictionary("gemma-scope-2b-pt-res", sae_id)
    assert dictionary.name == f"gemma-scope-2b-pt-res/{sae_id}" and dictionary.layer == 3
    assert isinstance(dictionary.value_rows, FileRows)
    assert torch.equal(dictionary.values(slice(None)), sae()["W_dec"])


def test_a_folder_of_layers(tmp_path: Path) -> None:
    for layer in (0, 3, 13):
        save(tmp_path / f"layer{layer}.sae.pt", {**sae(enc=(N, D), dec=(D, N)), "b_enc": torch.full((N,), layer / 1)})
    assert ql.load_dictionary(tmp_path, layer=3).layer == 3
    with pytest.raises(ValueError, match="holds 3 dictionaries .*name one, or pass layer="):
        ql.load_dictionary(tmp_path)
    with pytest.raises(ValueError, match="holds 3 dictionaries"):
        ql.load_dictionary(tmp_path, layer=7)


def test_a_gemma_scope_file_without_its_repository(tmp_path: Path) -> None:
    """The site is in the repository's name alone, so it is asked for, not assumed."""
    folder = "layer_3/width_16k/average_l0_14"
    gemma_scope(folder)(tmp_path)
    with pytest.raises(ValueError, match="does not say what it reads: .*gemma-scope-2b-pt-res.*pass hook_name="):
        ql.load_dictionary(tmp_path / folder)
    dictionary = ql.load_dictionary(tmp_path / folder, hook_name="blocks.3.hook_mlp_out")
    assert (dictionary.value_point, dictionary.key_point) == (8, None)


def test_a_cross_layer_transcoder_has_a_logit_lens_only(tmp_path: Path, gpt2_folder: Path) -> None:
    """What its features write is summed over layers: read out as it is, but no transport carries the sum."""
    model = ql.load_model(gpt2_folder)
    save(tmp_path / "W_enc_1.safetensors", {"W_enc_1": randn(N, 24), "b_enc_1": randn(N), "b_dec_1": randn(24)})
    save(tmp_path / "W_dec_1.safetensors", {"W_dec_1": randn(N, 2, 24)})
    (tmp_path / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n")
    dictionary = ql.load_dictionary(tmp_path, layer=1)
    assert isinstance(dictionary.value_rows, SummedRows)
    found = ql.signatures(dictionary, model, preset="logit_lens_value", k=3)
    logits = model.logits(randn(N, 2, 24).sum(1))
    assert torch.allclose(found.top_scores, logits.topk(3).values, atol=1e-5)
    sample = ql.Tokens(torch.randint(3, 61, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="write to 2 layers, so no single transport carries them"):
        ql.signatures(dictionary, model, preset="query_lens_value", tokens=sample)
    assert len(ql.signatures(dictionary, model, preset="query_lens_key", tokens=sample, k=3)) == N


def test_what_no_format_knows(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {"directions": randn(N, D)})
    with pytest.raises(
        ValueError, match=r"neither W_dec nor W_enc .*\(tensors: directions\); known are sae-lens: W_dec"
    ):
        ql.load_dictionary(tmp_path / "x.safetensors", layer=0)


def test_every_format_has_a_case() -> None:
    assert {case.format for case in CASES} == {f.name for f in FORMATS[: 1 - len(ANY_FILE)]}
