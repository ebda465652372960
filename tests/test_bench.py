"""The benchmarks run, and the report is that of the committed records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def bench(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **more}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_unknown_benchmark_is_named() -> None:
    done = bench("bench", "speed")
    assert done.returncode != 0 and "topk" in done.stderr


def test_report_is_what_the_records_say(tmp_path: Path) -> None:
    done = bench("bench.report", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    committed = ROOT / "bench" / "results" / "report.md"
    assert (tmp_path / "report.md").read_text() == committed.read_text(), "run python -m bench.report and commit it"
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
