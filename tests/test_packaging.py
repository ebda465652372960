"""The wheel carries both packages and the demo's files, and works from outside the checkout."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import csrc_triton, querylens_fast, torch
from querylens_fast.demo.showcase import load_example
for package in (csrc_triton, querylens_fast):
    assert "site-packages" in package.__file__, package.__file__
example = load_example()
assert len(example.dictionaries) == 5
found = querylens_fast.signatures(example.dictionaries[0], example.model, preset="logit_lens_value", k=3, features=[1])
again = querylens_fast.streamed_topk(torch.randn(2, 16), torch.randn(40, 16), 3, backend="triton")
import querylens_fast.analysis.run
from pathlib import Path
assert (Path(querylens_fast.__file__).parent / "analysis" / "configs" / "gpt2-small.yaml").is_file()
pages = Path(querylens_fast.__file__).parent / "serve"
assert (pages.parent / "__init__.pyi").is_file()
assert (pages / "templates" / "base.html.j2").is_file() and (pages / "static" / "style.css").is_file()
print(found.top_tokens[0], again.top_ids.shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a clean copy: what an earlier build left in build/ would travel along.
    source = folder / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel_installs_and_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that sees the test environment's libraries, but gets our packages from the wheel alone."""
    assert wheel.stat().st_size < 20 * 2**20
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    used = subprocess.run([python, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert used.returncode == 0, used.stderr[-2000:]
    assert "torch.Size([2, 3])" in used.stdout


def test_editable_install_has_both_packages() -> None:
    code = "import csrc_triton, querylens_fast; print(csrc_triton.__file__, querylens_fast.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert "csrc_triton" in found.stdout and "querylens_fast" in found.stdout
