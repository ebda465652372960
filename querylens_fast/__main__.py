"""``python -m querylens_fast`` is the command line."""

from querylens_fast.cli import app

app()
