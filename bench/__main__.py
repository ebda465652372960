"""``python -m bench NAME ...`` for ``python -m bench.NAME ...``: one line for each benchmark without a name."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "topk": "streamed top-k against what one would write otherwise",
    "signatures": "signatures of a block of features on a bfloat16 checkpoint of Gemma-2-2B's width",
    "lens": "transport and signatures of whole dictionaries against one walk for each feature",
    "reliability": "standard errors of scores against many disjoint samples: coverage, stable tokens, sample size",
    "faults": "kills, full disks, corruptions, hostile inputs, random top-k calls: what is lost, silent, run or wrong",
    "million": "a dictionary of a million features: time, memory, search",
    "serve": "the server over results of a million features: latencies under load, memory, time to the first answer",
    "families": "every family of transformers: how it is linearised, error against brute force",
    "linearisations": "a transport through a model's own layers against the hand-written linearisation: time, memory",
    "evaluation": "output scores by prefix against a straightforward implementation; gain of the adaptive preset",
    "integrations": "exports and calls of other tools beside what those tools do: time, memory",
    "relations": "features against features, both sides, to Parquet: time, memory, ratio to chunked torch",
    "compile_check": "every kernel variant compiled for every target: registers, spills, shared memory, instructions",
    "model": "predicted stage times of the GPU pipeline, from compiled code and shapes (no measurement)",
    "unproved": "rows that the GPU pipeline's first pass would leave unproved, by simulation",
    "gpu_check": "everything on a GPU machine: correctness, ceilings, peers, the goals",
    "picture": "the README's picture, from the demo's results",
    "report": "pictures and tables of the committed results",
}


def main() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name not in COMMANDS:
        listing = "\n".join(f"  {command:14s} {what}" for command, what in COMMANDS.items())
        raise SystemExit(f"python -m bench NAME [--help], where NAME is one of\n{listing}")
    importlib.import_module(f"bench.{name}").main(rest)


if __name__ == "__main__":
    main()
