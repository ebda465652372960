"""The error for a model that this package does not cover."""


class UnsupportedModelError(ValueError):
    """The model's architecture, or a variation of it, is not one this package reproduces."""
