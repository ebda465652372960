"""An export that is killed at any of its files ends, when it is called again, with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS

PLACE = {"model_id": "tiny", "source_set": "ql-res", "rows_per_file": 12}
TEXTS = [ql.Feature("m", i, 1, "sae", [ql.Activation("x", [("a", 1.0), ("b", 0.5)], 1.0, 0.5)]) for i in (2, 17)]


class Killed(BaseException):
    """Ends a call as a kill does: nothing catches it."""


@pytest.fixture(scope="module")
def model() -> ql.Model:
    return ql.load_model(ASSETS / "model")


@pytest.fixture(scope="module")
def dictionaries(model: ql.Model) -> list[ql.Dictionary]:
    rows = torch.randn(20, model.d_model, generator=torch.Generator().manual_seed(1))
    return [ql.directions(rows[layer:], layer=layer, name=f"layer {layer}") for layer in range(2)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("format", ["neuronpedia", "saedashboard", "columnar", "circuit-tracer"])
def test_an_export_killed_at_any_file_ends_with_the_same_bytes(
    format: str, model, dictionaries, tmp_path, monkeypatch
) -> None:
    exports: dict[str, Callable[[Path], object]] = {
        "neuronpedia": lambda out: ql.export_neuronpedia(
            dictionaries[1], model, out, **PLACE, activations=TEXTS, explanations={3: "three"}
        ),
        "saedashboard": lambda out: ql.export_saedashboard(dictionaries[1], model, out, rows_per_file=8),
        "columnar": lambda out: ql.export_saedashboard(dictionaries[1], model, out, into="columnar", rows_per_file=32),
        "circuit-tracer": lambda out: ql.export_circuit_tracer(dictionaries, out, transcoder_id="x", model=model),
    }
    exports[format](tmp_path / "whole")
    wanted, rename = files_of(tmp_path / "whole"), os.replace
    for survived in range(len(wanted) + 8):
        out, left = tmp_path / str(survived), iter(range(survived))

        def replace(source: Path, target: Path, left=left) -> None:
            if next(left, None) is None:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            try:
                exports[format](out)
                break
            except Killed:
                pass
        exports[format](out)
        assert files_of(out) == wanted, f"killed at file {survived}"
    else:
        pytest.fail("the export was killed at every file")
    assert survived >= 4


@pytest.mark.slow
def test_a_process_killed_while_it_exports_ends_with_the_same_bytes(dictionaries, model, tmp_path) -> None:
    place = {**PLACE, "rows_per_file": 1}
    whole = ql.export_neuronpedia(dictionaries[1], model, tmp_path / "whole", **place)
    code = (
        "import sys, torch, querylens_fast as ql; from querylens_fast.demo import ASSETS\n"
        "d = ql.directions(torch.load(sys.argv[2]), layer=1, name='layer 1')\n"
        "ql.export_neuronpedia(d, ql.load_model(ASSETS / 'model'), sys.argv[1], model_id='tiny', source_set='ql-res', "
        "rows_per_file=1)\n"
    )
    torch.save(dictionaries[1].values(slice(None)), tmp_path / "rows.pt")
    target = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", code, str(target), str(tmp_path / "rows.pt")], text=True)
    features, end = target / "tiny" / "1-ql-res" / "features", time.monotonic() + 60
    while time.monotonic() < end and not (features.is_dir() and len(list(features.glob("*.gz"))) >= 5):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert 5 <= len(list(features.glob("*.gz")))
    again = ql.export_neuronpedia(dictionaries[1], model, target, **place)
    assert files_of(again) == files_of(whole)
