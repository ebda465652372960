"""Pictures and tables of the committed records: ``python -m bench.report`` writes report.md, roofline.png, ratios.png.

Everything comes from the JSON files in bench/results; the newest record of each kind is shown, with the command that
made it. The same records give the same text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_text


def newest(folder: Path, prefix: str) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the record whose name, prefix and date, is last in order."""
    found = sorted(folder.glob(f"{prefix}-20*.json"))
    dated = [path for path in found if path.stem[len(prefix) + 1 :].count("-") == 2]
    return (dated[-1].name, json.loads(dated[-1].read_text(encoding="utf-8"))) if dated else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def topk_section(folder: Path) -> str:
    """The streamed top-k against its peers."""
    record = newest(folder, "cpu-topk")
    if record is None:
        return ""
    name, content = record
    source = f"[{name}]({name}); {_machine(content)}"
    parts = [f"## Streamed top-k on a CPU\n\n`python -m bench topk --out …` ({source})"]
    for case in content["cases"]:
        shape, times = case["shape"], case["times"]
        size = f"{shape['rows']} × {shape['d']} × {shape['V']:,}, k = {shape['k']}, both sides, {shape['dtype']}"
        rows = []
        # A record's goals bound ours over a peer's time; the table's ratios are a peer's over ours.
        goals = {g["peer"] if g["task"] == "ours" else g["task"]: g for g in case.get("goals", [])}
        for peer, t in times.items():
            ratio = case["speedup_over"].get(peer)
            spread = f"{t['p50_ms']:.0f} ({t['p20_ms']:.0f}–{t['p80_ms']:.0f})"
            rows.append([peer, spread, "" if ratio is None else f"{ratio:.2f}", _goal(goals.get(peer))])
        widened = f"; {case['widened']:.1%} of rows and sides widened" if "widened" in case else ""
        heading = f"**{case.get('kind', 'gaussian')}** – {size}; {case['tflops']:.2f} TFLOP/s{widened}"
        parts.append(heading + "\n\n" + table(["", "ms, p50 (p20–p80)", "times ours", "goal"], rows))
    return "\n\n".join(parts)


def _goal(goal: dict[str, Any] | None) -> str:
    """A goal and what was reached of it."""
    if goal is None:
        return ""
    return f"{goal['task']} ÷ {goal['peer']} ≤ {goal['at_most']:.3g}: {goal['reached']:.3g}"


def lens_section(folder: Path) -> str:
    """Transport and whole dictionaries."""
    rows, sources = [], []
    for prefix in ("cpu-lens", "cpu-lens-gpt2-small"):
        record = newest(folder, prefix)
        if record is None or "results" not in record[1]:
            continue
        sources.append(f"[{record[0]}]({record[0]})")
        for model in record[1]["results"]:
            shape = model["model"]
            label = f"{shape['layers']} × d {shape['d_model']}, {model['tokens']:,} tokens, {model['dtype']}"
            for side in ("value", "key"):
                s = model[side]
                rows.append(
                    [label, side, f"{s['fit_s']:.1f}", f"{s['fit_over_floor']:.2f}", f"{model['features']:,}",
                     f"{s['ratio']:.0f}", f"{s['break_even_features_a_layer']:.0f}"]
                )  # fmt: skip
            first = model["first_order_both_sides"]
            rows.append(
                [label, "first order, both", f"{first['fit_s']:.2f}", f"{first['fit_over_floor']:.3f}", "", "", ""]
            )
    head = ["model", "side", "sweep s", "over the floor", "features", "against one by one", "break-even a layer"]
    if not rows:
        return ""
    return f"## Transport and whole dictionaries\n\n`python -m bench lens` ({', '.join(sources)})\n\n" + table(
        head, rows
    )


def million_section(folder: Path) -> str:
    """A million features."""
    record = newest(folder, "cpu-million")
    if record is None:
        return ""
    name, content = record
    rows = []
    for case in content["cases"]:
        shape = case["shape"]
        for preset, p in case["presets"].items():
            use = p.get("use") or {}
            search = f"{use['search_string_s']:.2f}" if "search_string_s" in use else ""
            rows.append(
                [f"{shape['features']:,} × {shape['d']} × {shape['V']:,}", preset, f"{p['elapsed_s']:.0f}",
                 f"{p['features_per_s']:,.0f}", f"{p['ratio_to_gemm']:.2f}", f"{p['peak_anonymous_mib']:.0f}", search]
            )  # fmt: skip
    head = [
        "features × d × V",
        "preset",
        "s",
        "features/s",
        "over the bf16 GEMM",
        "peak MiB above mapped files",
        "search s",
    ]
    return f"## A dictionary that does not fit\n\n`python -m bench million` ([{name}]({name}))\n\n" + table(head, rows)


def relations_section(folder: Path) -> str:
    """Features against features."""
    record = newest(folder, "cpu-relations")
    if record is None:
        return ""
    name, content = record
    shape, whole = content["shape"], content["whole"]
    row = [
        f"{shape['features']:,} × {shape['readers']:,}, d = {shape['d']}, k = {shape['k']}", f"{whole['seconds']:.1f}",
        f"{whole['peak_mib'] / 1024:.2f}", f"{content['speedup_whole_over_torch']:.2f}",
    ]  # fmt: skip
    head = ["product", "s", "peak GiB", "chunked torch (extrapolated) over ours"]
    return f"## Features against features\n\n`python -m bench relations` ([{name}]({name}))\n\n" + table(head, [row])


def compiled_section(folder: Path) -> str:
    """The kernels' code."""
    parts = []
    for path in sorted(folder.glob("compile-check-triton-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = [r for r in content["variants"] if r["target"] == "sm_90" and r["variant"].startswith("fused bf16")]
        rows = [
            [r["variant"], str(r["registers"]), str(r["spills"]), f"{r['shared'] / 1024:.0f}",
             str(r["loop_instructions"]), str(r["epilogue_instructions"])]
            for r in wanted
        ]  # fmt: skip
        wrong = sum(bool(r["failures"]) for r in content["variants"])
        counted = f"{len(content['variants'])} variants, {wrong} wrong"
        title = f"Triton {content['triton']} ([{path.name}]({path.name})): {counted}"
        head = ["sm_90", "registers", "spills", "shared KiB", "loop", "epilogue"]
        parts.append(f"{title}\n\n" + table(head, rows))
    if not parts:
        return ""
    return "## Compiled kernels\n\n`python -m bench.compile_check --json …`\n\n" + "\n\n".join(parts)


def gpu_section(folder: Path) -> str:
    """The goals on a GPU."""
    record = newest(folder, "gpu-check")
    if record is None or record[1]["interpreted"]:
        return "## GPU\n\nNot yet measured (`python -m bench.gpu_check` measures it)."
    name, content = record
    rows = [
        [g["name"], g["goal"], "not measured" if g["reached"] is None else f"{g['reached']:.2f}{g['unit']}"]
        for g in content["goals"]
    ]
    return f"## GPU\n\n`python -m bench.gpu_check` ([{name}]({name}); {_machine(content)})\n\n" + table(
        ["", "goal", "reached"], rows
    )


def _machine(content: dict[str, Any]) -> str:
    m = content["machine"]
    return (
        f"{m['gpu'] or m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['date']}, load {m['load_average']:.1f}"
    )


def roofline(folder: Path, out: Path) -> None:
    """Attained rate over arithmetic intensity, below the measured ceilings of the machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = newest(folder, "cpu-topk")
    if record is None:
        raise SystemExit(f"no cpu-topk record in {folder}: run python -m bench topk --out {folder}/cpu-topk-DATE.json")
    content = record[1]
    case = content["cases"][0]
    shape = case["shape"]
    flop = 2 * shape["rows"] * shape["d"] * shape["V"]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    intensities = [2.0**e for e in range(-2, 11)]
    bandwidth = content["machine"].get("copy_gb_s")
    for name, label in (("gemm alone", "float32 GEMM"), ("gemm alone bf16", "bfloat16 GEMM")):
        ceiling = 1e-6 * flop / case["times"][name]["p50_ms"]
        roof = [min(ceiling, bandwidth * x) if bandwidth else ceiling for x in intensities]
        axes.plot(intensities, roof, label=f"{label}, {ceiling:.0f} GFLOP/s")
    for name, size in (("ours", 2), ("torch chunked + 2 x topk", 4), ("faiss.knn", 4)):
        if name in case["times"]:
            # Operands are read once and a tile's scores written and read: what has to move at least.
            moved = size * (shape["rows"] + shape["V"]) * shape["d"] + 2 * size * shape["rows"] * shape["V"]
            passes = 2 if name == "faiss.knn" else 1
            axes.plot(flop / moved, 1e-6 * flop / case["times"][name]["p50_ms"], "o", label=f"{name} ({passes} pass)")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that moves at least", ylabel="GFLOP/s")
    axes.set_title(f"{shape['rows']} × {shape['d']} × {shape['V']}, top and bottom {shape['k']}, exact float32")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "roofline.png", dpi=110)
    plt.close(figure)
    _ratios(content, out)


def _ratios(content: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    peers = ["torch chunked + 2 x topk", "faiss.knn", "gemm alone bf16"]
    for i, case in enumerate(content["cases"]):
        heights = [case["speedup_over"].get(peer, 0) for peer in peers]
        places = [x + 0.8 * i / len(content["cases"]) for x in range(len(peers))]
        axes.bar(places, heights, 0.8 / len(content["cases"]), label=case.get("kind", "gaussian"))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks([x + 0.4 for x in range(len(peers))], peers, fontsize=8)
    axes.set_ylabel("peer's time over ours")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "ratios.png", dpi=110)
    plt.close(figure)


def text(folder: Path) -> str:
    """The whole page."""
    sections = (topk_section, lens_section, million_section, relations_section, compiled_section, gpu_section)
    head = "# Measured\n\nWritten by `python -m bench.report` from the records beside it."
    pictures = "![Roofline of the streamed top-k](roofline.png)\n\n![Peers' times over ours](ratios.png)"
    parts = [part for part in (section(folder) for section in sections) if part]
    return "\n\n".join([head, pictures, *parts]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--out", type=Path, help="folder to write to; default: that of the records")
    options = parser.parse_args(arguments)
    out = options.out or options.results
    roofline(options.results, out)
    write_text(out / "report.md", text(options.results))
    print(f"written to {out / 'report.md'}, roofline.png and ratios.png beside it")


if __name__ == "__main__":
    main()
