"""Commands whose modules are imported when they are run, so that help and the server start without torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

OWN_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


class _Commands(Mapping[str, Any]):
    """Commands by name, each made when it is looked up."""

    def __init__(self, places: Mapping[str, str], own_arguments: tuple[str, ...], others: Mapping[str, Any]) -> None:
        self.places, self.own_arguments, self.others = places, own_arguments, others

    def __len__(self) -> int:
        return len(self.places) + len(self.others)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.places, *self.others)

    def __getitem__(self, name: str) -> Any:
        if name in self.others:
            return self.others[name]
        module, _, function = self.places[name].partition(".")
        command = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        alone = typer.Typer(add_completion=False)
        alone.command(name, context_settings=OWN_ARGUMENTS if name in self.own_arguments else None)(command)
        return typer.main.get_command(alone)

    def listed(self) -> dict[str, Any]:
        """Commands with nothing but their help text, which is read from the sources of their modules."""
        found: dict[str, Any] = {}
        for name, place in self.places.items():
            module, _, function = place.partition(".")
            tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
            body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
            found[name] = TyperCommand(name, help=ast.get_docstring(body))
        return {**found, **self.others}


def lazy_group(places: Mapping[str, str], own_arguments: tuple[str, ...] = ()) -> type[TyperGroup]:
    """A class for `typer.Typer(cls=…)`.

    Args:
        places: "module.function" within `querylens_fast.cli`, by command.
        own_arguments: Commands that take any further arguments.
    """

    class Group(TyperGroup):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.commands: Any = _Commands(places, own_arguments, self.commands)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            commands, self.commands = self.commands, self.commands.listed()
            try:
                super().format_help(ctx, formatter)
            finally:
                self.commands = commands

    return Group
