"""Neuronpedia's bulk folder, imported into a real PostgreSQL as its importer and as import.sql do.

The server is that of the package pgserver, started in a temporary folder and reached by a Unix socket.
"""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.integrations import neuronpedia
from querylens_fast.integrations.neuronpedia_tables import LOCAL_CREATOR
from querylens_fast.integrations.tokens import OUT_OF_RANGE, clean, token_strings

SCHEMA = """
CREATE TYPE "Visibility" AS ENUM ('PUBLIC', 'UNLISTED', 'PRIVATE');
CREATE TABLE "User" ("id" TEXT PRIMARY KEY, "name" TEXT NOT NULL);
CREATE TABLE "SourceRelease" ("name" TEXT PRIMARY KEY, "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE',
  "description" TEXT NOT NULL, "urls" TEXT[], "creatorName" TEXT NOT NULL, "creatorId" TEXT NOT NULL
  REFERENCES "User"("id"), "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE "Model" ("id" TEXT PRIMARY KEY, "displayNameShort" TEXT NOT NULL DEFAULT '', "displayName" TEXT NOT NULL
  DEFAULT '', "creatorId" TEXT NOT NULL REFERENCES "User"("id"), "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE',
  "layers" INTEGER NOT NULL, "neuronsPerLayer" INTEGER NOT NULL, "owner" TEXT NOT NULL,
  "updatedAt" TIMESTAMP(3) NOT NULL);
CREATE TABLE "SourceSet" ("modelId" TEXT NOT NULL REFERENCES "Model"("id"), "name" TEXT NOT NULL,
  "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE', "description" TEXT NOT NULL, "creatorName" TEXT NOT NULL,
  "urls" TEXT[], "creatorId" TEXT NOT NULL REFERENCES "User"("id"), "releaseName" TEXT REFERENCES
  "SourceRelease"("name"), UNIQUE ("modelId", "name"));
CREATE TABLE "Source" ("id" TEXT NOT NULL, "modelId" TEXT NOT NULL, "saelensRelease" TEXT, "saelensSaeId" TEXT,
  "hfRepoId" TEXT, "hfFolderId" TEXT, "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE', "setName" TEXT NOT NULL,
  "creatorId" TEXT NOT NULL REFERENCES "User"("id"), "num_prompts" INTEGER, "num_tokens_in_prompt" INTEGER,
  "dataset" TEXT, "notes" TEXT, UNIQUE ("modelId", "id"),
  FOREIGN KEY ("modelId", "setName") REFERENCES "SourceSet"("modelId", "name"));
CREATE TABLE "Neuron" ("modelId" TEXT NOT NULL, "layer" TEXT NOT NULL, "index" TEXT NOT NULL, "sourceSetName" TEXT,
  "creatorId" TEXT REFERENCES "User"("id"), "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  "maxActApprox" DOUBLE PRECISION DEFAULT 0, "hasVector" BOOLEAN NOT NULL DEFAULT false, "vector" DOUBLE PRECISION[],
  "vectorLabel" TEXT, "vectorDefaultSteerStrength" DOUBLE PRECISION DEFAULT 10, "hookName" TEXT,
  "topkCosSimIndices" INTEGER[], "topkCosSimValues" DOUBLE PRECISION[], "neuron_alignment_indices" INTEGER[],
  "neuron_alignment_values" DOUBLE PRECISION[], "neuron_alignment_l1" DOUBLE PRECISION[], "neg_str" TEXT[],
  "neg_values" DOUBLE PRECISION[], "pos_str" TEXT[], "pos_values" DOUBLE PRECISION[],
  "frac_nonzero" DOUBLE PRECISION NOT NULL DEFAULT 0, "decoder_weights_dist" DOUBLE PRECISION[],
  "logits_hist_data_bar_heights" DOUBLE PRECISION[], "logits_hist_data_bar_values" DOUBLE PRECISION[],
  PRIMARY KEY ("modelId", "layer", "index"),
  FOREIGN KEY ("modelId", "layer") REFERENCES "Source"("modelId", "id"),
  FOREIGN KEY ("modelId", "sourceSetName") REFERENCES "SourceSet"("modelId", "name"));
CREATE TABLE "Activation" ("id" TEXT PRIMARY KEY, "tokens" TEXT[], "index" TEXT NOT NULL, "layer" TEXT NOT NULL,
  "modelId" TEXT NOT NULL, "maxValue" DOUBLE PRECISION NOT NULL, "maxValueTokenIndex" INTEGER NOT NULL,
  "minValue" DOUBLE PRECISION NOT NULL, "values" DOUBLE PRECISION[], "creatorId" TEXT NOT NULL REFERENCES "User"("id"),
  "binMin" DOUBLE PRECISION, "binMax" DOUBLE PRECISION, "binContains" DOUBLE PRECISION,
  "qualifyingTokenIndex" INTEGER, FOREIGN KEY ("modelId", "layer", "index") REFERENCES "Neuron"("modelId", "layer",
  "index"));
CREATE TABLE "Explanation" ("id" TEXT PRIMARY KEY, "modelId" TEXT NOT NULL, "layer" TEXT NOT NULL, "index" TEXT NOT
  NULL, "description" TEXT NOT NULL, "authorId" TEXT NOT NULL REFERENCES "User"("id"), "typeName" TEXT,
  FOREIGN KEY ("modelId", "layer", "index") REFERENCES "Neuron"("modelId", "layer", "index"));
"""
PLACE = {"model_id": "tiny", "source_set": "ql-res"}


@pytest.fixture(scope="module")
def model() -> ql.Model:
    return ql.load_model(ASSETS / "model")


@pytest.fixture(scope="module")
def dictionary(model: ql.Model) -> ql.Dictionary:
    rows = torch.randn(40, model.d_model, generator=torch.Generator().manual_seed(1))
    rows[3] = 0
    return ql.directions(rows, layer=1, name="forty")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pgserver", reason="pip install pgserver, which holds a PostgreSQL")
    started = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield started
    started.cleanup()


@pytest.fixture
def database(server: Any, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Runs SQL, or a script, in a fresh database with Neuronpedia's tables."""
    import pgserver

    psql = Path(pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    name = f"db_{abs(hash(request.node.name)) % 10**9}"
    server.psql(f"CREATE DATABASE {name};")
    uri = server.get_uri(database=name)

    def run(sql: str = "", *, script: Path | None = None, check: bool = True) -> str:
        arguments = ["-f", script.name] if script else ["-At", "-v", "ON_ERROR_STOP=1"]
        done = subprocess.run(
            [psql, uri, "-q", *arguments],
            input=None if script else sql,
            cwd=script.parent if script else None,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip() if check else done.stderr

    run(SCHEMA + f"""INSERT INTO "User" VALUES ('{LOCAL_CREATOR}', 'local');""")
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def as_the_importer(run: Callable[..., str], table: str, path: Path) -> None:
    """Neuronpedia's own way: columns are the table's that the first line has; the file is one JSON array."""
    text = gzip.decompress(path.read_bytes()).decode().replace("\\u0000", " ").strip().splitlines()
    known = run(
        "SELECT column_name, CASE WHEN data_type = 'ARRAY' THEN udt_name::regtype::text || '[]' ELSE data_type END "
        f"FROM information_schema.columns WHERE table_name = '{table}';"
    )
    kinds = dict(row.split("|") for row in known.splitlines())
    names = [name for name in json.loads(text[0]) if name in kinds]
    assert set(names) == set(json.loads(text[0])), "keys that the table does not have"
    listed = ", ".join(f'"{name}"' for name in names)
    typed = ", ".join(f'"{name}" {kinds[name].replace("[][]", "[]")}' for name in names)
    run(
        f'INSERT INTO "{table}" ({listed}) SELECT {listed} FROM jsonb_to_recordset($q$[{",".join(text)}]$q$::jsonb) '
        f"AS t({typed}) ON CONFLICT DO NOTHING;"
    )


def features_with_texts(layer: int = 1) -> list[ql.Feature]:
    def text(values: list[float], tokens: list[str]) -> ql.Activation:
        return ql.Activation("x", list(zip(tokens, values, strict=True)), max(values), min(values))

    broken = text([0.0, 1.0], ["a", "\ud800"])
    nul = text([2.0, 0.5, 0.25], ["\0", "ü", "\n"])
    nan = ql.Activation("y", [("a", math.nan)], math.nan, 0.0)
    return [
        ql.Feature("m", 2, layer, "sae", [broken, nul]),
        ql.Feature("m", 30, layer, "sae", [nan]),
        ql.Feature("m", 31, layer, "sae", [text([3.0], ["last"])]),
    ]


def test_everything_is_imported_and_a_second_import_changes_nothing(model, dictionary, database, tmp_path) -> None:
    folder = ql.export_neuronpedia(
        dictionary, model, tmp_path, **PLACE, activations=features_with_texts(), explanations={5: "five \udfff"},
        description="a\0 \ud800", rows_per_file=16, neighbours=4, source_fields={"dataset": "pile", "num_prompts": 3},
        sample=SimpleNamespace(maximum=torch.full((40,), math.nan), density=torch.full((40,), 0.25)),
    )  # fmt: skip
    assert folder == tmp_path / "tiny" / "1-ql-res"
    database(script=folder / "import.sql")
    counts = 'SELECT (SELECT count(*) FROM "Neuron"), (SELECT count(*) FROM "Activation"), count(*) FROM "Explanation";'
    assert database(counts) == "40|3|1"
    everything = [
        database(f'SELECT md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM "{table}" t;')
        for table in ("SourceRelease", "Model", "SourceSet", "Source", "Neuron", "Activation", "Explanation")
    ]
    database(script=folder / "import.sql")
    for kind, table in (("features", "Neuron"), ("activations", "Activation"), ("explanations", "Explanation")):
        for path in sorted((folder / kind).iterdir()):
            as_the_importer(database, table, path)
    assert everything == [
        database(f'SELECT md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM "{table}" t;')
        for table in ("SourceRelease", "Model", "SourceSet", "Source", "Neuron", "Activation", "Explanation")
    ]
    row = database('SELECT "hasVector", "maxActApprox", "frac_nonzero", "hookName" FROM "Neuron" WHERE index = \'2\';')
    assert row == "t|2|0.25|blocks.1.hook_resid_post"
    assert database('SELECT tokens[1] FROM "Activation" WHERE "maxValue" = 2;') == ""
    assert database('SELECT tokens[2] FROM "Activation" WHERE "maxValue" = 1;') == "\ufffd"


def test_the_importers_own_way_works_on_an_empty_database(model, dictionary, database, tmp_path) -> None:
    folder = ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE, activations=features_with_texts(), sql=True)
    script = (folder / "import.sql").read_text().split("\\copy querylens_lines FROM PROGRAM")[0] + "COMMIT;\n"
    (folder / "metadata.sql").write_text(script)
    database(script=folder / "metadata.sql")
    as_the_importer(database, "Neuron", folder / "features" / "batch-0.jsonl.gz")
    as_the_importer(database, "Activation", folder / "activations" / "batch-0.jsonl.gz")
    assert database('SELECT count(*) FROM "Neuron";') == "40"


def test_lines_are_the_dashboards_numbers(model, dictionary, tmp_path) -> None:
    folder = ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE, neighbours=3)
    found = lines(folder / "features" / "batch-0.jsonl.gz")
    assert len({tuple(line) for line in found}) == 1, "every line has the same keys"
    signatures = ql.signatures(dictionary, model, preset="dashboard", k=10)
    strings = token_strings(model)
    unit = torch.nn.functional.normalize(dictionary.values(slice(None)), dim=1)
    cosines = unit @ unit.T - 2 * torch.eye(40)
    for i, line in enumerate(found):
        assert (line["index"], line["layer"], line["modelId"]) == (i, "1-ql-res", "tiny")
        assert line["pos_str"] == [strings[t] for t in signatures.top_ids[i].tolist()]
        assert torch.allclose(torch.tensor(line["neg_values"]), signatures.bottom_scores[i], atol=1e-5)
        assert torch.allclose(torch.tensor(line["vector"]), dictionary.values(slice(None))[i], rtol=1e-5, atol=1e-6)
        assert line["topkCosSimIndices"][0] == i and line["topkCosSimValues"][0] == 1
        assert i not in line["topkCosSimIndices"][1:]
        best = cosines[i].topk(3).values
        assert torch.allclose(torch.tensor(line["topkCosSimValues"][1:]), best, atol=2e-5)
        assert sum(line["logits_hist_data_bar_heights"]) == model.vocab_size
        assert line["logits_hist_data_bar_values"] == sorted(line["logits_hist_data_bar_values"])
    metadata = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.jsonl")}
    assert set(metadata) == {"release", "model", "sourceset", "source"}
    assert metadata["source"]["setName"] == metadata["sourceset"]["name"] == "ql-res"
    assert metadata["sourceset"]["releaseName"] == metadata["release"]["name"]
    assert "unembedding=raw" in metadata["source"]["notes"]


def test_a_table_of_neighbours_gives_the_same_lists(model, dictionary, tmp_path) -> None:
    computed = ql.export_neuronpedia(dictionary, model, tmp_path / "a", **PLACE, neighbours=3)
    table = ql.neighbours(dictionary, k=3, out=tmp_path / "n.parquet", progress=False)
    given = ql.export_neuronpedia(dictionary, model, tmp_path / "b", **PLACE, neighbours=table.path)
    first, second = (lines(f / "features" / "batch-0.jsonl.gz") for f in (computed, given))
    assert [x["topkCosSimIndices"] for x in first] == [x["topkCosSimIndices"] for x in second]
    none = ql.export_neuronpedia(dictionary, model, tmp_path / "c", **PLACE, neighbours=0, vectors=False)
    line = lines(none / "features" / "batch-0.jsonl.gz")[0]
    assert (line["topkCosSimIndices"], line["hasVector"], line["vector"]) == ([], False, [])


def test_results_are_exported_with_nan_and_rows_without_a_token(model, dictionary, database, tmp_path) -> None:
    out = tmp_path / "result.jsonl"
    ql.signatures(dictionary, model, preset="logit_lens_value", k=4, out=out, progress=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    plain = ql.signatures(dictionary, model, preset="logit_lens_value", k=4)
    plain.top_scores[5, 1] = math.nan
    plain.bottom_scores[6] = math.inf
    folder = ql.export_neuronpedia(plain, model, tmp_path / "np", **PLACE, dictionary=dictionary)
    found = lines(folder / "features" / "batch-0.jsonl.gz")
    assert len(found[5]["pos_str"]) == len(found[5]["pos_values"]) == 3
    assert found[6]["neg_str"] == [] and found[6]["hasVector"]
    assert found[7]["pos_values"] == [round(x, 5) for x in rows[7]["top_scores"]]
    database(script=folder / "import.sql")
    assert database('SELECT count(*) FROM "Neuron";') == "40"


def test_parquet_results_equal_results_in_memory(model, dictionary, tmp_path) -> None:
    stored = ql.signatures(
        dictionary, model, preset="logit_lens_value", k=4, out=tmp_path / "r.parquet", progress=False
    )
    found = ql.signatures(dictionary, model, preset="logit_lens_value", k=4)
    files = [
        ql.export_neuronpedia(source, model, tmp_path / name, **PLACE, rows_per_file=16)
        / "features"
        / "batch-2.jsonl.gz"
        for name, source in (("a", stored), ("b", found), ("c", stored.path))
    ]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_a_results_own_histogram_is_exported(model, dictionary, tmp_path, caplog) -> None:
    options: dict[str, Any] = {"preset": "logit_lens_value", "k": 4, "histogram": 20}
    found = ql.signatures(dictionary, model, **options)
    files = [ql.signatures(dictionary, model, **options, out=tmp_path / f"r{x}").path for x in (".parquet", ".jsonl")]
    exports = [
        lines(ql.export_neuronpedia(source, model, tmp_path / str(i), **PLACE, k=2) / "features" / "batch-0.jsonl.gz")
        for i, source in enumerate([found, *files])
    ]
    assert found.histogram is not None and "no histogram" not in caplog.text
    assert exports[0] == exports[1] == exports[2]
    for i, line in enumerate(exports[0]):
        assert line["logits_hist_data_bar_heights"] == found.histogram[i].tolist() and len(line["pos_values"]) == 2
        low, high = float(found.bottom_scores[i, 0]), float(found.top_scores[i, 0])
        first, last = line["logits_hist_data_bar_values"][0], line["logits_hist_data_bar_values"][-1]
        assert (first, last) == pytest.approx((low + (high - low) / 40, high - (high - low) / 40), abs=1e-5)


def test_more_than_a_thousand_files_are_never_written(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(neuronpedia, "MAX_FILES", 3)
    big = ql.directions(torch.randn(10, model.d_model), layer=0)
    folder = ql.export_neuronpedia(big, model, tmp_path, **PLACE, rows_per_file=1, neighbours=0)
    assert [len(lines(p)) for p in sorted((folder / "features").iterdir())] == [4, 4, 2]


def test_another_export_is_not_written_over(dictionary, model, tmp_path) -> None:
    ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE)
    with pytest.raises(FileExistsError, match="vectors"):
        ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE, vectors=False)
    with pytest.raises(FileExistsError, match="exists already"):
        ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE, resume=False)


def test_what_is_missing_is_said_before_anything_is_written(model, dictionary, tmp_path, caplog) -> None:
    found = ql.signatures(dictionary, model, preset="logit_lens_value", k=4)
    ql.export_neuronpedia(found, model, tmp_path / "said", **PLACE)
    for text in ("no histogram", "no vectors", "model_id 'tiny'", "activations"):
        assert text in caplog.text
    nameless = ql.load_model(ASSETS / "model")
    nameless.tokenizer = None
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"model_id": "a/b"}, "model_id is 'a/b'"),
        ({"source_fields": {"setname": 1}}, "source_fields has setname"),
        ({"activations": features_with_texts(layer=7)}, "none of which is exported"),
        ({"explanations": {99: "x"}}, "feature 99"),
        ({"explanations": {1: None}}, "has None for feature 1"),
        ({"source_fields": {"num_prompts": "many"}}, "num_prompts='many'; expected int"),
        ({"urls": "https://a.b"}, "urls is 'https://a.b'; expected a list"),
        ({"layer": "1-x"}, "layer is '1-x'"),
        ({"rows_per_file": 2.5}, "rows_per_file is 2.5"),
        ({"k": 0}, "k is 0"),
        ({"neighbours": -1}, "neighbours is -1"),
        ({"unembedding": "other"}, "unembedding is 'other'"),
        ({"token_style": "html"}, "token_style is 'html'"),
    ]
    for wrong, message in mistakes:
        with pytest.raises(ValueError, match=message):
            ql.export_neuronpedia(dictionary, model, tmp_path / "out", **{**PLACE, **wrong})
    with pytest.raises(ValueError, match="no tokenizer"):
        ql.export_neuronpedia(dictionary, nameless, tmp_path / "out", **PLACE)
    broken = dictionary.values(slice(None)).clone()
    broken[7, 3] = math.nan
    with pytest.raises(ValueError, match="feature 7 holds NaN"):
        ql.export_neuronpedia(ql.directions(broken, layer=1), model, tmp_path / "out", **PLACE, neighbours=0)
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_layers_is_enough(dictionary, model, tmp_path) -> None:
    frame = ql.load_model(ASSETS / "model", linearisation="none")
    folders = [ql.export_neuronpedia(dictionary, m, tmp_path / str(i), **PLACE) for i, m in enumerate((model, frame))]
    first, second = (folder / "features" / "batch-0.jsonl.gz" for folder in folders)
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((folders[1] / "model.jsonl").read_text())["neuronsPerLayer"] == 0


def test_token_strings_are_spelled_as_dashboards_do(model) -> None:
    strings = token_strings(model)
    pieces = {i: piece for piece, i in model.tokenizer.get_vocab().items()}
    assert len(strings) == model.vocab_size
    spaced = next(i for i, piece in pieces.items() if piece.startswith("Ġ"))
    assert strings[spaced] == pieces[spaced].replace("Ġ", " ")
    assert all(strings[i] == OUT_OF_RANGE for i in set(range(model.vocab_size)) - set(pieces))
    assert clean("a\ud800b\0\U0001f600") == "a\ufffdb \U0001f600"
