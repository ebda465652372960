"""The quickstart notebook runs, cell after cell, in an empty folder."""

import contextlib
import io
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def test_the_quickstart_notebook_runs(tmp_path: Path, monkeypatch) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and all(not cell["outputs"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for cell in cells:
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    for text in ("2048 features of layer 1", "promotes:", "activated by:", "import.sql"):
        assert text in said.getvalue()
    assert (tmp_path / "exports" / "demo" / "1-ql-value" / "features" / "batch-0.jsonl.gz").is_file()
