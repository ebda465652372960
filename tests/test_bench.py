"""The benchmarks run: the GPU check's whole logic under the interpreter, and the report from the committed records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **more}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_gpu_check_runs_its_logic_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "checked.json"
    done = bench("bench.gpu_check", "--interpret", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["interpreted"] and len(record["checks"]) > 50 and all(check["ok"] for check in record["checks"])
    assert all("skipped" not in item and "failed" not in item for item in record["items"].values()), record["items"]
    # No time that was taken under the interpreter is passed on.
    assert all(goal["reached"] is None for goal in record["goals"]) and "not measured" in done.stdout
    assert record["items"]["case gpt2 float32"]["times"]["ours"]["p50_ms"] is None


def test_gpu_check_stops_in_time(tmp_path: Path) -> None:
    out = tmp_path / "checked.json"
    code = (
        "from bench import checks, gpu_check; checks.run_all = lambda device, seed: []; "
        f"gpu_check.main(['--interpret', '--budget', '0', '--out', {str(out)!r}])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    items = json.loads(out.read_text())["items"]
    assert items and all("were spent" in item["skipped"] for item in items.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_gpu_check_reports_a_measurement_that_fails_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "checked.json"
    code = (
        "from bench import checks, gpu_check; checks.run_all = lambda device, seed: []; "
        "gpu_check.CASES_TIMED, gpu_check.SWEEPS = [('gpt3', 'float32')], []; "
        f"gpu_check.main(['--interpret', '--out', {str(out)!r}])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED: case gpt3 float32: KeyError: 'gpt3'" in done.stdout, done.stderr[-2000:]
    items = json.loads(out.read_text())["items"]
    assert "failed" not in items["a million features"]


def test_unknown_benchmark_is_named() -> None:
    done = bench("bench", "speed")
    assert done.returncode != 0 and "topk" in done.stderr


def test_report_is_what_the_records_say(tmp_path: Path) -> None:
    done = bench("bench.report", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    committed = ROOT / "bench" / "results" / "report.md"
    assert (tmp_path / "report.md").read_text() == committed.read_text(), "run python -m bench.report and commit it"
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
