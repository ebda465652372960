"""`python -m bench faults`: a little of each fault, more of it as a slow test, and the counts that the docs show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults import corruptions, disks, hostile, kills, products, table
from bench.faults.workload import Workload

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, limits and mounts as Linux has them")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return Workload(tmp_path_factory.mktemp("faults") / "work")


@linux
def test_kills_and_full_disks(workload: Workload) -> None:
    jobs = [workload.job(name) for name in ("signatures, JSON lines", "a token sample")]
    killed = kills.run(workload, 6, jobs=jobs)
    assert killed["kills"] >= 3 and killed["problems"] == []
    assert disks.run(workload, 2, jobs=jobs)["problems"] == []


@linux
def test_corruptions(workload: Workload) -> None:
    damaged = corruptions.run(workload, 8)
    assert damaged["corruptions"] == 8 and damaged["problems"] == []


@linux
@pytest.mark.slow
def test_hostile_inputs(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYLENS_SECRET", "")
    tried = hostile.run(workload, 60)
    assert tried["hostile inputs"] == 60 and tried["problems"] == []


def test_random_products() -> None:
    assert [wrong for seed in range(60) if (wrong := products.wrong(seed, "torch", "cpu"))] == []


@linux
@pytest.mark.slow
def test_the_short_command(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, "-W", "ignore", "-m", "bench", "faults", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "nothing lost, silent, run, told or wrong" in done.stdout
    assert json.loads(out.read_text())["parts"].keys() == {
        "kills",
        "interrupts",
        "disks",
        "corruptions",
        "hostile",
        "products",
    }


def test_the_docs_show_the_record() -> None:
    record = ROOT / "bench" / "results" / "cpu-faults-2026-11-25.json"
    parts = json.loads(record.read_text())["parts"]
    assert table(parts) in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    least = {"kills": 300, "disks": 40, "corruptions": 300, "hostile": 400}
    what = {"disks": "full disks", "hostile": "hostile inputs"}
    assert all(part[what.get(name, name)] >= least[name] for name, part in parts.items() if name in least)
