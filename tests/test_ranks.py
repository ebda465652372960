"""Several processes of one run on this machine, over gloo: the same results, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.lens.storage import StoredSignatures

MODEL, TOKENS, DICTIONARY = str(ASSETS / "model"), str(ASSETS / "tokens.safetensors"), str(ASSETS / "sae_layer2")
TRANSPORT = ["transport", MODEL, TOKENS, "--num-samples", "3", "--energy", "probes", "--n-probes", "2"]
SIGNATURES = ["signatures", DICTIONARY, MODEL, "--preset", "logit_lens_value", "--block-rows", "128", "--k", "5"]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port()]
    command += ["-m", "querylens_fast", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)


def alone(arguments: list[str], cwd: Path) -> None:
    command = [sys.executable, "-m", "querylens_fast", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_transport_over_two_processes_is_that_of_one(tmp_path: Path) -> None:
    done = torchrun([*TRANSPORT, "--out", "two.safetensors"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("transport of") == 1
    alone([*TRANSPORT, "--out", "one.safetensors"], tmp_path)
    one, two = (ql.load_transport(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.metadata == two.metadata
    for ours, theirs in ((one.matrices, two.matrices), (one.energies, two.energies)):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (theirs[key] - tensor).norm() < 1e-5 * tensor.norm()


@pytest.mark.slow
def test_signatures_over_two_processes_are_byte_for_byte_those_of_one(tmp_path: Path) -> None:
    done = torchrun([*SIGNATURES, "--out", "two.parquet"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2048 signatures") == 1
    alone([*SIGNATURES, "--out", "one.parquet"], tmp_path)
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def start(rank: int, port: str, arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    """One process as torchrun would start it, without its agent that stops the others."""
    variables = environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = [sys.executable, "-m", "querylens_fast", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("out.parquet.parts/part-*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_process_is_named_and_the_run_resumes(dying: int, tmp_path: Path) -> None:
    command = [*long_run(tmp_path), "out.parquet"]
    port = free_port()
    processes = [start(rank, port, command, tmp_path) for rank in (0, 1)]
    try:
        until(lambda: len(parts(tmp_path)) >= 2, processes)
        processes[dying].send_signal(signal.SIGKILL)
        survivor = processes[1 - dying]
        _, errors = survivor.communicate(timeout=90)
    finally:
        for process in processes:
            process.kill()
    assert survivor.returncode == 2
    assert f"rank {dying} of 2" in errors and "start the same command again" in errors
    assert 2 <= len(parts(tmp_path)) < 20 and not (tmp_path / "out.parquet").exists()
    alone(command, tmp_path)
    alone([*command[:-1], "whole.parquet"], tmp_path)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.slow
def test_a_process_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    port = free_port()
    good = [*SIGNATURES, "--out", "out.parquet"]
    processes = [
        start(0, port, good, tmp_path),
        start(1, port, [*good[:1], "missing.safetensors", *good[2:]], tmp_path),
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [2, 2]
    said = outputs[0][1] + outputs[1][1]
    assert said.count("error:") == 1 and "missing.safetensors" in said


@pytest.mark.slow
def test_processes_with_other_arguments_are_refused(tmp_path: Path) -> None:
    port = free_port()
    command = [*SIGNATURES, "--out", "out.parquet"]
    other = [*command[: command.index("--k")], "--k", "6", *command[command.index("--k") + 2 :]]
    processes = [start(0, port, command, tmp_path), start(1, port, other, tmp_path)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [2, 2]
    assert "rank 1 of 2 was started with other arguments than rank 0" in outputs[1][1]
    assert "error:" not in outputs[0][1] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_need_one_folder(tmp_path: Path) -> None:
    port = free_port()
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    command = [*SIGNATURES, "--features", "0:512", "--out", "out.parquet"]
    processes = [start(rank, port, command, folder) for rank, folder in enumerate(folders)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert processes[0].returncode == 2 and not (folders[0] / "out.parquet").exists()
    assert "holds 256 rows of 512; all processes of a run have to write to the same folder" in outputs[0][1]


def long_run(tmp_path: Path) -> list[str]:
    """A run slow enough to be stopped in the middle: ablations, a feature at a time."""
    ql.load_tokens(TOKENS).head(4).save(tmp_path / "sample.safetensors")
    sample = ["--tokens", str(tmp_path / "sample.safetensors"), "--preset", "token_change", "--features", "0:20"]
    return ["signatures", DICTIONARY, MODEL, *sample, "--block-rows", "1", "--k", "5", "--out"]


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    limit = time.monotonic() + 120
    while not condition() and time.monotonic() < limit:
        assert all(process.poll() is None for process in processes), "a process ended too early"
        time.sleep(0.02)
    assert condition()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_is_named(stopped: int, tmp_path: Path) -> None:
    """SIGSTOP: also of rank 0, which keeps the rendezvous and then answers nobody."""
    command = [*long_run(tmp_path), "out.parquet"]
    port = free_port()
    processes = [start(rank, port, command, tmp_path) for rank in (0, 1)]
    try:
        until(lambda: len(parts(tmp_path)) >= 2, processes)
        processes[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, errors = processes[1 - stopped].communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - stopped].returncode == 2
    assert f"rank {stopped} of 2" in errors and "start the same command again" in errors
    alone(command, tmp_path)
    assert ql.verify(tmp_path / "out.parquet") == []


@pytest.mark.slow
def test_a_process_that_loses_the_shared_folder_is_named(tmp_path: Path) -> None:
    """Two processes in folders of their own write to one through links, until it is gone."""
    (tmp_path / "shared").mkdir()
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        (home / "results").symlink_to(tmp_path / "shared")
    command, port = [*long_run(tmp_path), "results/out.parquet"], free_port()
    processes = [start(rank, port, command, home) for rank, home in enumerate(homes)]
    try:
        until(lambda: len(parts(tmp_path / "shared")) >= 2, processes)
        (tmp_path / "shared").rename(tmp_path / "elsewhere")
        began = time.monotonic()
        outputs = [process.communicate(timeout=60) for process in processes]
        assert time.monotonic() - began < 30
    finally:
        for process in processes:
            process.kill()
    said = outputs[0][1] + outputs[1][1]
    assert [process.returncode for process in processes] == [2, 2], said
    assert said.count("error:") >= 1 and "out.parquet" in said
    (tmp_path / "elsewhere").rename(tmp_path / "shared")
    alone(command, homes[0])
    assert ql.verify(tmp_path / "shared" / "out.parquet") == []


def two_nodes(arguments: list[str], homes: list[Path]) -> list[subprocess.CompletedProcess[str]]:
    """A command on two simulated machines of one and two processes: torchrun's agents, each in its own folder."""
    port = free_port()
    agents = []
    for node, (home, processes) in enumerate(zip(homes, (2, 1), strict=True)):
        more = ["--nnodes=2", f"--node_rank={node}", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *more, f"--master_port={port}"]
        command += ["-m", "querylens_fast", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append(subprocess.Popen(command, cwd=home, env=environment(), **pipes))
    outputs = [agent.communicate(timeout=240) for agent in agents]
    return [
        subprocess.CompletedProcess(arguments, agent.returncode, *output)
        for agent, output in zip(agents, outputs, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_two_machines_with_a_shared_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        (home / "results").symlink_to(tmp_path / "shared")
    nodes = two_nodes([*SIGNATURES, "--out", f"results/{name}"], homes)
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr[-2000:] + nodes[1].stderr[-2000:]
    assert sum(node.stdout.count("2048 signatures") for node in nodes) == 1
    alone([*SIGNATURES, "--out", f"one{Path(name).suffix}"], tmp_path)
    assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / f"one{Path(name).suffix}").read_bytes()


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path) -> None:
    done = torchrun(["signatures", "missing.safetensors", MODEL, "--out", "out.parquet"], tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_run_by_configuration_over_two_processes_is_that_of_one(name: str, tmp_path: Path) -> None:
    given = [f"model={MODEL}", f"dictionary={DICTIONARY}", f"tokens={TOKENS}", "num_samples=3", "dtype=float32"]
    given += ["baseline=query_lens_key_approx", "features=0:600", "block_rows=64", "device=cpu", "k=5"]
    command = ["run", "-cn", "base", *given, f"format={name.split('.')[1]}"]
    done = torchrun([*command, f"output_filename={tmp_path}/two/{name}"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("results:") == 1
    alone([*command, f"output_filename={tmp_path}/one/{name}"], tmp_path)
    kind = name.split(".")[1]
    one, two = (StoredSignatures(tmp_path / n / name, 600, kind).table() for n in ("one", "two"))
    # A transport fitted by two processes differs in the order of its sums.
    assert one["feature"].equals(two["feature"])
    pairs = [(a["top_ids"], b["top_ids"]) for a, b in zip(one.to_pylist(), two.to_pylist(), strict=True)]
    assert sum(a == b for a, b in pairs) > 590


@pytest.mark.slow
def test_commands_that_share_nothing_take_one_process(tmp_path: Path) -> None:
    """Said by the first process alone."""
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "querylens_fast", "verify", "x.parquet"]
        variables = environment(WORLD_SIZE="2", RANK=rank)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        said = "error: verify takes one process: start it without torchrun" in done.stderr
        assert done.returncode == 2 and said == (rank == "0")


@pytest.mark.slow
def test_jsonl_over_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Rows of a run that was stopped, with one process, stay; the file is the one that nobody interrupted."""
    alone([*SIGNATURES, "--out", "one.jsonl"], tmp_path)
    lines = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_bytes(b"".join([*lines[:128], *lines[256:384]]))
    (tmp_path / "two.jsonl.run.json").write_bytes((tmp_path / "one.jsonl.run.json").read_bytes())
    done = torchrun([*SIGNATURES, "--out", "two.jsonl"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2048 signatures") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_variables_of_torchrun_are_wanted_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "querylens_fast", *SIGNATURES]
    done = subprocess.run(command, cwd=tmp_path, env=environment(WORLD_SIZE="2"), capture_output=True, text=True)
    assert done.returncode == 2 and "RANK, MASTER_ADDR, MASTER_PORT is not set" in done.stderr
