"""Versions of the packages that computed a result, for its metadata."""

from __future__ import annotations

from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each distribution, by name; raises PackageNotFoundError for an unknown one."""
    return {name: version(name) for name in packages}
