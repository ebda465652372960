"""Plots of subspace channels (the last two as in Query Lens, arXiv 2606.07617, Fig. 5). Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from querylens_fast.relations.channel_statistics import ChannelMaps, channel_maps, overlaps_by_distance, random_overlap
from querylens_fast.relations.channels import Space
from querylens_fast.relations.tables import RelationTable


def draw_channels(found: RelationTable, folder: str | Path, space: Space = "write") -> list[Path]:
    """Write channels-<space>-overlaps.png, -groups.png and, where sources have several maps, -distance.png to a folder.

    The first shows the overlap of every two maps, ordered by destination; the second how the overlaps of the pairs that
    share their destination, their source, or neither are distributed, with the overlap of random subspaces; the third
    the overlap of maps from one source by how many layers lie between their destinations, mean and standard error.

    Raises:
        ImportError: matplotlib is missing; it says how to install it.
        ValueError: The table is none of `subspace_channels`.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps = channel_maps(found, space)
    random = random_overlap(maps, found.metadata["d_model"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"channels-{space}-{name}.png" for name in ("overlaps", "groups")]
    order = sorted(range(len(maps.layers)), key=lambda i: maps.layers[i][::-1])
    labels = ["{} → {}".format(*maps.layers[i]) for i in order]

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(maps.overlaps[order][:, order].numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="overlap OL")
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("source → destination, by destination")
    axes.set_title(f"What maps {space}: overlap of their subspaces")
    figure.savefig(paths[0], dpi=150)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    groups = _groups(maps)
    bins = torch.linspace(0, 1, 41).tolist()
    for name, values in groups.items():
        axes.hist(values, bins=bins, density=True, alpha=0.6, label=f"{name} ({len(values)})")
    axes.axvline(random, color="black", linestyle="--", label="random subspaces")
    axes.set(xlabel="overlap OL", ylabel="density", title=f"Pairs of maps, by what they share ({space})")
    axes.legend()
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)

    distances = overlaps_by_distance(maps)
    if not distances:
        return paths
    paths.append(folder / f"channels-{space}-distance.png")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    mean = [float(values.mean()) for values in distances.values()]
    error = [float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0 for values in distances.values()]
    axes.errorbar(list(distances), mean, error, marker="o", capsize=3, label="same source")
    axes.axhline(random, color="black", linestyle="--", label="random subspaces")
    axes.set(xlabel="layers between the destinations", ylabel="overlap OL", title=f"Maps from one source ({space})")
    axes.set_xticks(list(distances))
    axes.legend()
    figure.savefig(paths[2], dpi=150)
    plt.close(figure)
    return paths


def _groups(maps: ChannelMaps) -> dict[str, Any]:
    """The overlaps of pairs by what they share; no empty group."""
    above = torch.ones_like(maps.overlaps, dtype=torch.bool).triu(1)
    several = {
        "same destination": maps.same_destination,
        "same source": maps.same_source,
        "neither": ~(maps.same_destination | maps.same_source),
    }
    found = {name: maps.overlaps[above & chosen].numpy() for name, chosen in several.items()}
    return {name: values for name, values in found.items() if len(values)}
