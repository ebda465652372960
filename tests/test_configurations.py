"""Run configurations that are wrong: one line that names the file and the key, nothing evaluated, nothing written."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from querylens_fast.analysis.configuration import checked, compose, parse_overrides
from querylens_fast.analysis.run import main
from querylens_fast.cli import app
from querylens_fast.demo import ASSETS

GOOD = f"model: {ASSETS / 'model'}\ndictionary: {ASSETS / 'sae_layer1'}\nfeatures: '0:3'\nbaseline: logit_lens_value\n"
ALIASES = "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
"""Nine lists of nine lists of …: 9^9 values once they are copied."""
HOSTILE = {
    "empty": "",
    "a list": "- 1\n- 2\n",
    "a number": "17\n",
    "a null": "null\n",
    "not YAML": "a: [1, 2\nb: {",
    "tabs": "model:\n\t- x\n",
    "keys that are no names": "1: 2\nnull: 3\n",
    "a key that is a list": "? [1, 2]\n: 3\n",
    "a python tag": "model: !!python/object/apply:os.system ['touch ran']\n",
    "k of a word": GOOD + "k: many\n",
    "k of a list": GOOD + "k: [1]\n",
    "k below 1": GOOD + "k: -5\n",
    "k null": GOOD + "k: null\n",
    "k missing": GOOD + "k: ???\n",
    "k beyond any number": GOOD + "k: 1" + "0" * 5000 + "\n",
    "model a mapping": "model: {a: 1}\nfeatures: all\n",
    "model of nothing": GOOD.replace(str(ASSETS / "model"), "''"),
    "a layer and a half": GOOD + "layer: 1.5\n",
    "layers that are words": GOOD + "layer: [a]\n",
    "a layer that is true": GOOD + "layer: true\n",
    "features of a mapping": GOOD + "features: {a: 1}\n",
    "features that are fractions": GOOD + "features: [0.5]\n",
    "num_samples of 0": GOOD + "num_samples: 0\n",
    "num_samples of a fraction": GOOD + "num_samples: 1.5\n",
    "a value that is no number": GOOD + "token_change_value: .nan\n",
    "memory without bounds": GOOD + "max_memory_gib: .inf\n",
    "a baseline that is a list": GOOD + "baseline: [x]\n",
    "a dtype of another library": GOOD + "dtype: int8\n",
    "a device of another world": GOOD + "device: abacus\n",
    "a format of another library": GOOD + "format: xml\n",
    "defaults of itself": "defaults: [hostile]\n",
    "defaults that are no names": "defaults: [1, [2]]\n",
    "defaults that are a mapping": "defaults: {a: b}\n",
    "defaults far away": "defaults: [../../../../etc/passwd]\n",
    "an unknown resolver": GOOD + "seed: ${nothing:1}\n",
    "a reference to itself": GOOD + "logs_dir: ${logs_dir}\n",
    "a reference to nothing": GOOD + "logs_dir: ${nothing}\n",
    "aliases of aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n" + ALIASES + "features: *i\n",
    "an alias of itself": "features: &a [*a]\n",
    "nested deep": "features: " + "[" * 3000 + "]" * 3000 + "\n",
    "not text": "\udcff\udcfe\udc80",
    "features of lists": GOOD + "features: [[1, 2], [3]]\n",
    "a feature that is not there": GOOD + "features: [99999999]\n",
    "an output that is a folder": GOOD + "output_filename: {folder}\n",
    "an output that is a device": GOOD + "output_filename: /dev/full\nformat: null\n",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    text = HOSTILE[name].replace("{folder}", str(tmp_path / "folder.jsonl"))
    path = tmp_path / "hostile.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = CliRunner().invoke(app, ["run", "-cn", str(path)])
    assert done.exit_code == 2, done.output
    assert "error: " in done.stderr and "Traceback" not in done.output
    assert len(done.stderr) < 3000
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".run.json")) == [
        "folder.jsonl",
        "hostile.yaml",
    ]


SECRET = "hunter2-do-not-print"
SECRETS = [
    "${oc.env:SECRET}",
    "x${oc.env:SECRET,y}",
    "${${oc.env:SECRET}}",
    "${oc.decode:${oc.env:SECRET}}",
    r"\${oc.env:SECRET}",
]


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize("key", ["model", "logs_dir", "features", "tokens", "k"])
def test_environment_variables_are_not_read(key: str, value: str, tmp_path: Path, monkeypatch) -> None:
    """Not in a file, an override, or a configuration composed elsewhere; nor in lists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    listed = f"features=['{value}']" if key == "features" else f"{key}={value}"
    done = CliRunner().invoke(app, ["run", "-cn", str(path), listed])
    path.write_text(GOOD + f"{key}: '{value}'\n")
    from_file = CliRunner().invoke(app, ["run", "-cn", str(path)])
    for result in (done, from_file):
        assert result.exit_code == 2 and "are not read from a configuration" in result.stderr
        assert SECRET not in result.output
    with pytest.raises(ValueError, match="are not read from a configuration"):
        main(OmegaConf.create({key: value}))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_value_may_be_another_keys() -> None:
    assert compose("gpt2-small", ["output_filename=${logs_dir}-${seed}.jsonl"]).output_filename == "base-42.jsonl"
    assert checked({"seed": 3, "logs_dir": "run${seed}"}).logs_dir == "run3"
    with pytest.raises(ValueError, match="no key=value"):
        parse_overrides(["k"])
