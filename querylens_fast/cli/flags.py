"""Flags made from the functions that commands call: a name, type, default and help text is written once, there.

A command names its groups of flags as defaults of parameters, and gets each group as a dictionary of keyword arguments:

    @with_flags
    def transport(model: str, fitting: Flags = flags_of(ql.fit_transport, "energy", "seed")) -> None:
        ql.fit_transport(model, **fitting)

A name that is in two groups is one flag, with the later group's default and help, and goes to both.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from querylens_fast.lens.options import described, plain_type

Flags = dict[str, Any]


class _Group:
    """Some arguments of a function or dataclass, as parameters of a command."""

    def __init__(self, source: Callable[..., Any], names: tuple[str, ...], defaults: Flags, helps: dict[str, str]):
        arguments, hints, texts = inspect.signature(source).parameters, get_type_hints(source), described(source)
        self.parameters = {}
        for name in names:
            option = typer.Option(help=helps.get(name) or _first_sentence(texts.get(name, "")))
            default = defaults.get(name, arguments[name].default)
            annotation = Annotated[plain_type(hints[name]), option]
            self.parameters[name] = arguments[name].replace(default=default, annotation=annotation)


def flags_of(
    source: Callable[..., Any], *names: str, defaults: Flags | None = None, helps: dict[str, str] | None = None
) -> Any:
    """A group of flags, the default of a command's parameter.

    Args:
        source: A function or dataclass. Types and defaults are its own, help texts the first sentences of the
            descriptions in its docstring.
        *names: Its arguments; by default all keyword-only ones.
        defaults: Other defaults.
        helps: Other help texts, where the docstring speaks of Python objects.
    """
    if not names:
        parameters = inspect.signature(source).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return _Group(source, names, defaults or {}, helps or {})


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its groups of flags in place of the parameters that name them."""
    own = inspect.signature(command, eval_str=True)
    groups = {name: p.default for name, p in own.parameters.items() if isinstance(p.default, _Group)}
    parameters = {name: p for name, p in own.parameters.items() if name not in groups}
    for group in groups.values():
        parameters |= group.parameters
    flags = {name for group in groups.values() for name in group.parameters}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        in_groups = {name: {flag: given[flag] for flag in group.parameters} for name, group in groups.items()}
        command(**{name: value for name, value in given.items() if name not in flags}, **in_groups)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    run.__signature__ = own.replace(parameters=ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def _first_sentence(text: str) -> str:
    plain = " ".join(text.split()).replace("`", "")
    sentence = re.split(r"\.(?= [A-Z\"])", plain)[0].rstrip(".")
    return sentence if sentence[-1:] in ("", "…") else f"{sentence}."
