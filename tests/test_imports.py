"""The packages import each other in one direction only; every arrow is read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"csrc_triton", "querylens_fast.runs"},
    {"querylens_fast.topk"},
    {"querylens_fast.models"},
    {"querylens_fast.dictionaries"},
    {"querylens_fast.transport"},
    {"querylens_fast.lens"},
    {
        "querylens_fast.relations",
        "querylens_fast.evaluation",
        "querylens_fast.integrations",
        "querylens_fast.analysis",
        "querylens_fast.queries",
    },
    {"querylens_fast"},
    {"querylens_fast.demo"},
    {"querylens_fast.serve"},
    {"querylens_fast.cli"},
    {"querylens_fast.__main__"},
]
"""From the bottom up: a package may import those below it, and itself."""
SIBLINGS = {
    ("querylens_fast.integrations", "querylens_fast.evaluation"),
    ("querylens_fast.integrations", "querylens_fast.relations"),
    ("querylens_fast.evaluation", "querylens_fast.relations"),
}
"""Arrows within one level."""
KERNEL_USERS = {"querylens_fast/topk/triton_backend.py"}
"""Modules of the Python layer that may import csrc_triton."""


def imported(path: Path) -> list[str]:
    """Every module that a file imports, at any depth, with the name where that is a module too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively (line {node.lineno})"
            found.append(str(node.module))
            found += [f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")]
    return [name for name in found if name.split(".")[0] in ("csrc_triton", "querylens_fast")]


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def package_of(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "csrc_triton" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def sources() -> list[tuple[str, Path]]:
    paths = [p for top in ("csrc_triton", "querylens_fast") for p in sorted((ROOT / top).rglob("*.py"))]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def level_of(package: str) -> int:
    levels = [i for i, layer in enumerate(LAYERS) if package in layer]
    assert levels, f"{package} is not in LAYERS: say where it belongs"
    return levels[0]


def test_arrows_point_down() -> None:
    wrong = []
    for module, path in sources():
        own = package_of(module)
        for name in imported(path):
            other = package_of(name)
            allowed = other == own or level_of(other) < level_of(own) or (own, other) in SIBLINGS
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_triton_backend_imports_the_kernels() -> None:
    users = {
        str(path.relative_to(ROOT))
        for module, path in sources()
        if package_of(module) != "csrc_triton" and any(n.split(".")[0] == "csrc_triton" for n in imported(path))
    }
    assert users == KERNEL_USERS


def test_no_module_imports_itself_through_others() -> None:
    names = dict(sources())
    graph = {m: {n for n in imported(p) if n in names and n != m} for m, p in names.items()}
    # A package's __init__ runs before its modules, so what a module imports from its own package is no arrow to it.
    for module, targets in graph.items():
        graph[module] = {t for t in targets if not module.startswith(t + ".")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("import circle: " + " → ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())
