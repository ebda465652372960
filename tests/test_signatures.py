"""Signatures: what comes out in memory, in Parquet and in JSONL; resuming; refusals before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from golden_cases import golden
from tiny_models import D_MODEL, LAYERS, VOCAB

import querylens_fast as ql
from querylens_fast.lens.pipeline import Pipeline

K = 4


@pytest.fixture(scope="module")
def transport(gpt2: ql.Model, sample: ql.Tokens) -> ql.Transport:
    return ql.fit_transport(gpt2, sample, energy="probes", n_probes=8, progress=False)


@pytest.fixture(scope="module")
def neurons(gpt2: ql.Model) -> ql.Dictionary:
    return ql.neuron_dictionary(gpt2, 1)


def test_scores_are_the_logits_of_the_normed_vector(gpt2: ql.Model, neurons: ql.Dictionary) -> None:
    found = ql.signatures(neurons, gpt2, preset="logit_lens_value", k=K)
    logits = gpt2.source.lm_head(gpt2.source.transformer.ln_f(neurons.values(slice(None))))
    expected = logits.topk(K)
    assert torch.equal(found.top_ids, expected.indices)
    assert torch.allclose(found.top_scores, expected.values)
    assert torch.allclose(found.bottom_scores, logits.topk(K, largest=False).values)
    assert found.top_tokens[3][0] == f"w{found.top_ids[3, 0]}" or found.top_ids[3, 0] < 3
    raw = ql.signatures(neurons, gpt2, preset="logit_lens_value", k=K, final_norm=False)
    assert torch.allclose(raw.top_scores, gpt2.source.lm_head(neurons.values(slice(None))).topk(K).values)


def test_embedding_readouts(tiny_model: ql.Model, sample: ql.Tokens) -> None:
    """embed and embed_cosine_centered by their definitions, embedding scale included."""
    dictionary = ql.neuron_dictionary(tiny_model, 1)
    keys = dictionary.keys(slice(None))
    table = tiny_model.source.get_input_embeddings()(torch.arange(VOCAB))
    found = ql.signatures(dictionary, tiny_model, preset="logit_lens_key", k=K)
    assert torch.allclose(found.top_scores, (keys @ table.T).topk(K).values)
    transport = ql.fit_transport(tiny_model, sample, progress=False)
    centre = table[sample.ids[sample.valid_mask]].mean(0)
    moved = transport.apply(keys, "key", "full", dictionary.point("key"))
    expected = (moved @ torch.nn.functional.normalize(table - centre, dim=1).T).topk(K)
    found = ql.signatures(dictionary, tiny_model, preset="query_lens_key", transport=transport, k=K)
    assert torch.allclose(found.top_scores, expected.values)
    plain = ql.signatures(dictionary, tiny_model, preset=("key", "identity", "embed_cosine_centered"), k=K)
    own = (keys @ torch.nn.functional.normalize(table - table.mean(0), dim=1).T).topk(K)
    assert torch.allclose(plain.top_scores, own.values)


def test_scores_at(gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, sample: ql.Tokens) -> None:
    for preset, options in (
        ("query_lens_value", {"transport": transport}),
        ("query_lens_key", {"transport": transport}),
        ("token_change", {"tokens": sample}),
    ):
        found = ql.signatures(neurons, gpt2, preset=preset, k=K, features="3:9", **options)
        again = ql.scores_at(neurons, gpt2, range(3, 9), found.top_ids, preset=preset, **options)
        assert torch.allclose(again, found.top_scores)
        assert torch.allclose(found.scores_at([3], found.bottom_ids[0]), found.bottom_scores[:1])
    with pytest.raises(ValueError, match="token id 61 is outside"):
        found.scores_at([3], [61])


def test_no_features(gpt2: ql.Model, neurons: ql.Dictionary) -> None:
    found = ql.signatures(neurons, gpt2, preset="logit_lens_value", k=K, features=torch.empty(0, dtype=torch.int64))
    assert found.top_ids.shape == (0, K)


def test_blocks_do_not_matter(gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport) -> None:
    options = {"preset": "query_lens_value_approx", "transport": transport, "k": K, "layers": True}
    whole = ql.signatures(neurons, gpt2, **options)
    parts = ql.signatures(neurons, gpt2, block_rows=7, **options)
    assert torch.equal(whole.top_ids, parts.top_ids) and len(whole.stats) == 2
    assert torch.allclose(whole.stats["rel_var"], parts.stats["rel_var"])
    assert [t.layer for t in parts.layer_terms or []] == [1, 2]
    for a, b in zip(whole.layer_terms or [], parts.layer_terms or [], strict=True):
        assert torch.equal(a.topk.top_ids, b.topk.top_ids) and torch.allclose(a.energy, b.energy)
    energies = torch.stack([t.energy for t in whole.layer_terms or []]).sum(0)
    assert torch.allclose(energies, torch.ones_like(energies))


def test_few_features_walk_and_many_fit(gpt2: ql.Model, neurons: ql.Dictionary, sample: ql.Tokens, monkeypatch) -> None:
    """Without a transport a small selection is walked, a large one fits its own; the answers agree."""
    import querylens_fast.lens.planning as planning

    fits = []
    original = planning.fit_transport
    monkeypatch.setattr(planning, "fit_transport", lambda *a, **k: fits.append(1) or original(*a, **k))
    few = ql.signatures(neurons, gpt2, tokens=sample, k=K, features="0:5", stats="none")
    assert not fits and not few.stats
    many = ql.signatures(neurons, gpt2, tokens=sample, k=K)
    assert fits and len(many) == neurons.n_features > D_MODEL
    assert torch.allclose(many.top_scores[:5], few.top_scores)


def test_softcapped_ablation_is_the_definition(tmp_path_factory, sample: ql.Tokens) -> None:
    """Gemma 2 caps its logits, so the mean is over capped logits: compare with the model run by hooks."""
    from tiny_models import save_tiny_model

    model = ql.load_model(save_tiny_model("gemma2", tmp_path_factory.mktemp("gemma2")), dtype="float64")
    for preset, value, sign in (("token_change", 10.0, 1), ("zero_out", 0.0, -1)):
        found = ql.signatures(ql.neuron_dictionary(model, 1), model, preset=preset, tokens=sample, k=K, features=[4])
        down = model.source.model.layers[1].mlp.down_proj

        def change(_module, args, value=value):
            hidden = args[0].clone()
            hidden[..., 4] = value
            return (hidden,)

        clean = model.source(sample.ids).logits
        handle = down.register_forward_pre_hook(change)
        changed = model.source(sample.ids).logits
        handle.remove()
        expected = sign * (changed - clean).mean((0, 1))
        assert torch.allclose(found.top_scores[0], expected.topk(K).values, atol=1e-6)
        assert torch.allclose(found.scores_at([4], [5, 6])[0], expected[[5, 6]], atol=1e-6)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_hold_what_memory_holds(
    gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, tmp_path: Path, suffix: str
) -> None:
    options = {"preset": "query_lens_key_approx", "transport": transport, "k": K, "features": "5:40", "layers": True}
    found = ql.signatures(neurons, gpt2, **options)
    stored = ql.signatures(neurons, gpt2, out=tmp_path / f"out.{suffix}", block_rows=8, progress=False, **options)
    table = stored.table().to_pydict()
    assert stored.n_features == 35 and table["feature"] == found.features.tolist()
    for name in ("top_ids", "bottom_ids", "top_tokens", "bottom_tokens"):
        value = getattr(found, name)
        assert table[name] == (value.tolist() if isinstance(value, torch.Tensor) else value)
    assert torch.allclose(torch.tensor(table["top_scores"], dtype=torch.float64), found.top_scores)
    spread = table["rel_var"] if suffix == "parquet" else [s["rel_var"] for s in table["stats"]]
    assert torch.allclose(torch.tensor(spread, dtype=torch.float64), found.stats["rel_var"])
    assert table["layer_indices"][0] == [2, 1, 0]
    assert stored.metadata()["preset"] == "query_lens_key_approx"
    leftovers = {p.name for p in tmp_path.iterdir()} - {f"out.{suffix}", f"out.{suffix}.run.json"}
    assert not leftovers


def test_jsonl_rows_are_the_references(
    gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, tmp_path: Path
) -> None:
    ql.signatures(neurons, gpt2, transport=transport, k=K, features=[7, 2], out=tmp_path / "o.jsonl", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["feature_index"] for r in rows] == [0, 1]
    assert rows[0]["feature_str"] == f"Feature neurons-{neurons.n_features}/1/7"
    assert rows[0]["baseline"] == "query_lens_value" and rows[0]["stream_transition"] == "full"
    assert {
        "feature_vector",
        "readout",
        "layer",
        "top_tokens",
        "bottom_tokens",
        "top_ids",
        "bottom_ids",
        "stats",
    } <= set(rows[0])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_stopped_run_resumes(
    gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, tmp_path: Path, suffix: str, monkeypatch
) -> None:
    out, done = tmp_path / f"out.{suffix}", []
    options = {"transport": transport, "k": K, "block_rows": 16, "progress": False}
    original = Pipeline.__call__

    def stop_after_two(self, ids, vectors):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(ids))
        return original(self, ids, vectors)

    monkeypatch.setattr(Pipeline, "__call__", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        ql.signatures(neurons, gpt2, out=out, **options)
    if suffix == "jsonl":
        with open(out, "a") as file:
            file.write('{"feature_index": 32, "half')
    done.clear()
    monkeypatch.setattr(Pipeline, "__call__", lambda self, ids, v: done.append(len(ids)) or original(self, ids, v))
    stored = ql.signatures(neurons, gpt2, out=out, **options)
    assert sum(done) == neurons.n_features - 32
    table = stored.table().to_pydict()
    assert table["feature"] == list(range(neurons.n_features))
    assert table["top_ids"] == ql.signatures(neurons, gpt2, transport=transport, k=K).top_ids.tolist()
    done.clear()
    ql.signatures(neurons, gpt2, out=out, **options)
    assert not done


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_another_runs_file_is_refused(
    gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"out.{suffix}"
    ql.signatures(neurons, gpt2, transport=transport, k=K, features="0:3", out=out, progress=False)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"another run \(different: k\)"):
        ql.signatures(neurons, gpt2, transport=transport, k=K + 1, features="0:3", out=out, progress=False)
    with pytest.raises(FileExistsError, match="exists already"):
        ql.signatures(neurons, gpt2, transport=transport, k=K, features="0:3", out=out, resume=False, progress=False)
    assert out.read_bytes() == before


def test_a_file_that_is_not_ours_is_left_alone(gpt2: ql.Model, neurons: ql.Dictionary, tmp_path: Path) -> None:
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("not json\n")
    with pytest.raises(FileExistsError, match=r"no .run.json"):
        ql.signatures(neurons, gpt2, preset="logit_lens_value", out=foreign, progress=False)
    assert foreign.read_text() == "not json\n"
    pq_file = tmp_path / "table.parquet"
    import pyarrow as pa

    pq.write_table(pa.table({"x": [1]}), pq_file)
    with pytest.raises(ValueError, match="not written by querylens_fast"):
        ql.signatures(neurons, gpt2, preset="logit_lens_value", out=pq_file, progress=False)


def write_signatures(model_folder: Path, out: Path) -> None:
    model = ql.load_model(model_folder)
    matrix = torch.randn(4000, model.d_model, generator=torch.Generator().manual_seed(0))
    options = {"preset": "logit_lens_value", "k": 20, "block_rows": 500, "progress": False}
    ql.signatures(ql.directions(matrix, layer=1), model, out=out, **options)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from test_signatures import write_signatures
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
write_signatures(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_full_disk_loses_nothing(gpt2_folder: Path, tmp_path: Path, suffix: str) -> None:
    """A file-size limit stands for the disk: the error says what to do, and the run resumes when there is room."""
    out = tmp_path / f"out.{suffix}"
    limit = "400000" if suffix == "parquet" else "1000000"
    script = [sys.executable, "-c", FULL_DISK, str(gpt2_folder), str(out), limit]
    failed = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert failed.returncode == 1
    assert "is kept; run the same call again" in failed.stderr
    write_signatures(gpt2_folder, out)
    if suffix == "parquet":
        assert pq.read_table(out)["feature"].to_pylist() == list(range(4000))
    else:
        assert [json.loads(x)["feature"] for x in out.read_text().splitlines()] == list(range(4000))


def test_refusals_write_nothing(
    gpt2: ql.Model, neurons: ql.Dictionary, transport: ql.Transport, sample: ql.Tokens, tmp_path: Path
) -> None:
    no_energy = ql.fit_transport(gpt2, sample, orders=("full",), progress=False)
    cases = [
        ({"preset": "query_lense"}, "unknown preset 'query_lense'; known are logit_lens_value"),
        ({"preset": ("value", "sideways", "unembed")}, "stream_transition is 'sideways'"),
        ({"preset": ("key", "tuned_lens", "unembed")}, "feature_vector='value' only"),
        ({"preset": ("value", "full", None)}, "needs a readout"),
        ({"preset": ("value", "full")}, "expected a name or"),
        ({"transport": None}, "needs transport="),
        ({"k": 0}, "k is 0"),
        ({"k": VOCAB + 1}, f"k is {VOCAB + 1}; expected 1 to the vocabulary's {VOCAB}"),
        ({"features": [10_000]}, "feature 10000 is not in"),
        ({"stats": "all"}, "stats is 'all'"),
        ({"stats": "exact"}, "pass tokens="),
        ({"stats": "rel_var", "transport": no_energy}, "energy='probes'"),
        ({"preset": "query_lens_value_adaptive", "transport": no_energy}, "needs energies for value/full"),
        (
            {"preset": "query_lens_value_adaptive", "transport": no_energy, "adaptive_threshold": 0.5},
            "not value/first_order",
        ),
        ({"preset": "query_lens_value_adaptive", "adaptive_threshold": 2}, "adaptive_threshold is 2"),
        ({"preset": "token_change"}, "pass tokens="),
        ({"preset": "tuned_lens"}, "needs tuned_lens='params.pt'"),
        ({"tuned_lens": "x.pt"}, "does not use one"),
        ({"layers": True}, "has no terms by layer"),
        ({"block_rows": 0}, "block_rows is 0"),
        ({"out": tmp_path / "x.csv"}, "expected a .parquet or .jsonl"),
        ({"backend": "cublas"}, "backend"),
    ]
    for change, message in cases:
        options = {"transport": transport, "out": tmp_path / "x.jsonl", "k": K, "progress": False, **change}
        with pytest.raises(ValueError) as caught:
            ql.signatures(neurons, gpt2, **options)
        assert message in str(caught.value), (change, str(caught.value))
        written = [p for p in tmp_path.iterdir() if p.stat().st_size and not p.name.endswith(".run.json")]
        assert not written, change
        for leftover in tmp_path.iterdir():
            leftover.unlink()


def test_tuned_lens_files(gpt2: ql.Model, neurons: ql.Dictionary, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.signatures(neurons, gpt2, preset="tuned_lens", tuned_lens=tmp_path / "params.pt")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"1.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        ql.signatures(neurons, gpt2, preset="tuned_lens", tuned_lens=tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"0.weight": torch.eye(D_MODEL), "0.bias": torch.zeros(D_MODEL)}, tmp_path / "params.pt")
    with pytest.raises(ValueError, match=r"has no 1\.weight and 1\.bias"):
        ql.signatures(neurons, gpt2, preset="tuned_lens", tuned_lens=tmp_path / "params.pt")
    torch.save({"1.weight": torch.eye(3), "1.bias": torch.zeros(3)}, tmp_path / "params.pt")
    with pytest.raises(ValueError, match=r"1\.weight is \[3, 3\], but d_model is 24"):
        ql.signatures(neurons, gpt2, preset="tuned_lens", tuned_lens=tmp_path / "params.pt")
    last = ql.neuron_dictionary(gpt2, LAYERS - 1)
    found = ql.signatures(last, gpt2, preset="tuned_lens", tuned_lens=tmp_path / "params.pt", k=K)
    assert torch.equal(found.top_ids, ql.signatures(last, gpt2, preset="logit_lens_value", k=K).top_ids)


def test_zero_out_of_a_silent_feature_is_exactly_nothing() -> None:
    """A feature that never fires on the sample changes nothing: all scores are 0, ids in order."""
    case = golden("gpt2-standard-sae")
    model = ql.load_model(case.model_path, dtype="float64")
    tokens = ql.load_tokens(case.tokens_path, model=model)
    dictionary = ql.load_dictionary(case.sae_path(1))
    found = ql.signatures(dictionary, model, preset="zero_out", tokens=tokens, k=3)
    from querylens_fast.lens.ablations import activations

    silent = activations(model, dictionary, tokens.ids).amax((0, 1)) == 0
    assert silent.any()
    assert not found.top_scores[silent].any()
    assert (found.top_ids[silent] == torch.arange(3)).all()


def test_downstream_readers(tiny_model: ql.Model) -> None:
    """A feature's readers by definition: the change of the pre-activations per unit of the normed stream's scale."""
    matrix = torch.randn(6, D_MODEL, dtype=torch.float64)
    dictionary = ql.directions(matrix, layer=0)
    found = ql.downstream(dictionary, tiny_model, targets="blocks.1.attn.W_K", k=K)
    block = tiny_model.blocks[1].attention
    x = torch.randn(D_MODEL, dtype=torch.float64)

    def read(v: torch.Tensor) -> torch.Tensor:
        if block.norm.centred:
            v = v - v.mean()
        return block.W_K @ (v * (block.norm.weight if block.norm.weight is not None else 1))

    expected = torch.stack([read(x + v) - read(x) for v in matrix])
    assert torch.allclose(found.top_scores, expected.topk(K).values)
    keys = ql.directions(torch.randn(9, D_MODEL, dtype=torch.float64), layer=1)
    virtual = ql.downstream(dictionary, tiny_model, targets=keys, k=K, features=[2])
    assert torch.allclose(virtual.top_scores[0], (matrix[2] @ keys.keys(slice(None)).T).topk(K).values)
    for targets, message in (
        ("blocks.9.mlp.W_in", "expected a Dictionary"),
        ("lm_head", "like 'blocks.2.mlp.W_in'"),
        ("blocks.0.attn.W_Q", "lie before layer 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ql.downstream(dictionary, tiny_model, targets=targets, k=K)


def test_bfloat16_by_the_error_rule(gpt2: ql.Model, gpt2_folder: Path, sample: ql.Tokens) -> None:
    """Ours in bfloat16 errs at most three times as much as the lens done one by one in torch's bfloat16."""
    coarse = ql.load_model(gpt2_folder, dtype="bfloat16")
    everything, features = torch.arange(VOCAB), list(range(20))
    for preset, norm in (("query_lens_value", True), ("query_lens_key", False)):
        options = {"preset": preset, "tokens": sample}
        truth = ql.scores_at(ql.neuron_dictionary(gpt2, 1), gpt2, features, everything, **options).double()
        neurons = ql.neuron_dictionary(coarse, 1)
        found = ql.scores_at(
            neurons,
            coarse,
            features,
            everything,
            preset=preset,
            transport=ql.fit_transport(coarse, sample, progress=False),
        ).double()
        walked = ql.signatures(neurons, coarse, features=features, vectors=True, **options).vectors.bfloat16()
        if norm:
            theirs = coarse.source.lm_head(coarse.source.transformer.ln_f(walked)).double()
        else:
            table = coarse.W_E - coarse.embed(sample.ids)[sample.valid_mask].float().mean(0).bfloat16()
            theirs = (walked @ (table / table.norm(dim=1, keepdim=True)).T).double()
        ours, reference = ((x - truth).norm() / truth.norm() for x in (found, theirs))
        assert ours <= 3 * reference + 1e-5, (preset, float(ours), float(reference))
