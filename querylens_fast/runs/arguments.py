"""Numbers that callers pass: checked once, by name, before anything is computed from them."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least ``least``, NumPy's included; no boolean, no float, no text.

    Raises:
        ValueError: Anything else, with the argument's name and value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return int(value)


def finite_number(name: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite real number of at least ``least`` and larger than ``above``; no boolean, no complex number, no text.

    Raises:
        ValueError: Anything else, with the argument's name and value.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < least or value <= above:
        limit = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{limit}")
    return float(value)
