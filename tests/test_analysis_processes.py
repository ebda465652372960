"""The reference's interface under torch.distributed: every process ends with the answers of the whole sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from golden_cases import CASES, assert_same_row, golden
from test_analysis import analyse

BASELINES = (
    "query_lens_value",
    "query_lens_key",
    "query_lens_value_approx",
    "query_lens_key_approx",
    "token_change",
    "zero_out",
)


def agree(rank: int, world_size: int, meeting: str, name: str) -> None:
    """One process: its share of the sample, the golden rows."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    case = golden(name)
    for baseline in BASELINES:
        for layer, feature in zip(case.layers, case.features, strict=False):
            found = analyse(name, baseline, layer, feature, rank=rank, world_size=world_size)
            assert_same_row(found, case, baseline, layer, feature)
    # No process may leave while another still talks to it: gloo's threads would be torn down in use.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_goldens_over_two_processes(name: str, tmp_path: Path) -> None:
    multiprocessing.spawn(agree, args=(2, str(tmp_path / "meeting"), name), nprocs=2)
