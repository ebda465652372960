"""`bench.gpu_check`: its parts under the interpreter, and what becomes of a part that hangs, crashes or raises."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_parts
from bench.gpu_check import PARTS, Part, run_child

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CHILDREN = {
    "right": 'print(\'{"ok": true, "times": {"one": 1}}\')',
    "wrong": "print('{\"ok\": false}')",
    "raises": "print('{\"times\": {\"one\": 1}}', flush=True); raise KeyError('magic')",
    "crashes": "import os, signal; print('noise'); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import subprocess; print('{\"times\": {\"one\": 1}}', flush=True); subprocess.run(['sleep', '60'])",
}
FAST = ("kernel,rows,float32", "kernel,fused,bfloat16", "kernel,winners,bfloat16", "kernel,select,bfloat16")
FAST += ("kernel,columns,float32", "kernel,finish,float32", "kernel,sums,bfloat16", "graph")


def checked(monkeypatch: pytest.MonkeyPatch, out: Path, parts: list[Part], *arguments: str) -> tuple[Any, int]:
    """The record and the exit status of a run over children that need no package."""
    monkeypatch.setattr(gpu_check, "PARTS", tuple(parts))
    monkeypatch.setattr(gpu_check.Run, "command", lambda self, part: [sys.executable, "-c", CHILDREN[part.name]])
    status = 0
    try:
        gpu_check.main(["--out", str(out / "found.json"), *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    return json.loads((out / "found.json").read_text()), status


def test_a_part_that_hangs_crashes_or_raises_is_recorded_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [Part("hangs", 1.0, together=True), Part("crashes", 20, together=True), Part("raises", 20)]
    record, status = checked(monkeypatch, tmp_path, [*parts, Part("wrong", 20), Part("right", 20)])
    items, printed = record["items"], capsys.readouterr().out
    assert items["hangs"]["failed"] == "not done within 1 s" and items["hangs"]["times"] == {"one": 1}
    assert items["crashes"]["failed"] == "ended by SIGSEGV"
    assert "KeyError: 'magic'" in items["raises"]["failed"] and items["raises"]["times"] == {"one": 1}
    assert items["right"]["times"] == {"one": 1} and items["right"]["ok"] and "failed" not in items["right"]
    assert status == 1 and "WRONG: wrong" in printed and "FAILED: crashes: ended by SIGSEGV" in printed
    assert items["hangs"]["wall_s"] < 10 and record["dropped"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_parts_without_time_are_dropped_from_the_end_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
    parts = [Part("right", 20), Part("hangs", 20), Part("wrong", 20)]
    record, status = checked(monkeypatch, tmp_path, parts, "--budget", "1.1")
    assert record["items"]["right"]["ok"] and "failed" in record["items"]["hangs"] and status == 1
    assert record["dropped"] == ["wrong"] and "dropped for want of time: wrong" in capsys.readouterr().out
    assert record["spent_s"] < 10


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CHILDREN, "about", "raise SystemExit('no GPU here')")
    record, status = checked(monkeypatch, tmp_path, [Part("about", 20), Part("right", 20)])
    assert status == 2 and list(record["items"]) == ["about"]


def test_goals_count_only_what_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "GOALS", (gpu_check.Goal("twice", "a,bfloat16", "gemm alone", 1.1),))
    times = {"ours": {"p50_ms": 2.0}, "gemm alone": {"p50_ms": 1.0}}
    monkeypatch.setitem(CHILDREN, "a,bfloat16", f"print({json.dumps(json.dumps({'times': times}))})")
    monkeypatch.setitem(CHILDREN, "b,bfloat16", CHILDREN["wrong"])
    record, status = checked(monkeypatch, tmp_path, [Part("a,bfloat16", 20)])
    assert record["goals"] == [{"name": "twice", "goal": "≤ 1.1×", "unit": "×", "reached": 2.0}] and status == 0
    record, _ = checked(monkeypatch, tmp_path, [Part("a,bfloat16", 20), Part("b,bfloat16", 20)])
    assert record["goals"][0]["reached"] is None
    record, _ = checked(monkeypatch, tmp_path, [Part("a,bfloat16", 20)], "--interpret")
    assert record["goals"][0]["reached"] is None and record["spent_s"] is None


def test_a_child_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 0.4; touch {tmp_path}/alive']); print('{{}}')"
    found: list[dict[str, Any]] = []
    assert run_child([sys.executable, "-c", program], 5, found.append) is None and found == [{}]
    assert run_child(["sleep", "3"], 0.6, found.append) == "not done within 0.6 s"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(part.name, marks=pytest.mark.slow) for part in PARTS
                                           if part.name not in FAST)])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="python -m bench.gpu_check does it")
def test_every_part_runs_interpreted(name: str, tmp_path: Path) -> None:
    part, *rest = name.split(",")
    context = gpu_parts.Context(interpreted=True, seed=7, folder=tmp_path)
    found = list(gpu_parts.PARTS[part](context, *rest))
    assert found and all(line.get("ok", True) for line in found), found
    assert not any("peers that failed" in line for line in found), found
    json.dumps(found)


@pytest.mark.slow
def test_check_runs_as_one_command(tmp_path: Path) -> None:
    """Through the children, on a part that takes times: none that was taken under the interpreter is passed on."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu_check", "--interpret"]
    command += ["--out", str(tmp_path / "x.json"), "--part", "kernel,select,bfloat16"]
    command += ["--part", "stages,gpt2,bfloat16,fused"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "x.json").read_text())
    assert list(record["items"]) == ["about", "kernel,select,bfloat16", "stages,gpt2,bfloat16,fused"]
    stage = record["items"]["stages,gpt2,bfloat16,fused"]
    assert stage["times"]["select"]["p50_ms"] is None and stage["glue_ms"] is None and stage["flags"]
    assert record["machine"]["torch"] == torch.__version__ and "not measured" in done.stdout


def test_parts_need_no_package_that_a_gpu_machine_may_lack() -> None:
    """Everything a part imports is there without the packages of the dictionaries' and results' other formats."""
    program = (
        "import sys\n"
        "for name in ('sae_lens', 'duckdb', 'omegaconf', 'datasets', 'transformer_lens', 'faiss', 'fastapi', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import bench.gpu_parts, bench.gpu_kernels, bench.checks, bench.topk, bench.sweeps, bench.cases\n"
        "import querylens_fast, querylens_fast.topk.triton_backend, csrc_triton.tune\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
