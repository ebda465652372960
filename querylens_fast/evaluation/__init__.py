"""Scores of signatures: whether a feature's tokens are those that activate it."""
