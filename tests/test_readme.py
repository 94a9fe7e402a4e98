"""README: every command it shows parses, and its table of files is complete."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from adapter import AdapterConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if re.search(r"\w+\.py", line) and not line.startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(Path(words[at]).stem)
    monkeypatch.setattr(sys, "argv", words[at:])
    assert data.parse_args(script.Args, toy=getattr(script, "TOY", None)) is not None


def test_the_openvla_policy_answers_in_model_units(monkeypatch):
    seen = []

    class Fake(dict):
        """A processor, its inputs and a model at once."""

        from_pretrained = classmethod(lambda cls, *_, **options: cls())

        def __call__(self, prompt, image):
            seen.append((prompt, image.size))
            return self

        def to(self, *_, **options):
            return self

        def predict_action(self, unnorm_key, do_sample):
            assert unnorm_key == "bridge_orig" and not do_sample
            return np.array([-0.03, 0.01, 0.09, 0, 0.1, -0.5, 0.99 if len(seen) == 1 else 0.79])

    module = types.ModuleType("transformers")
    module.AutoProcessor = module.AutoModelForVision2Seq = Fake
    monkeypatch.setitem(sys.modules, "transformers", module)
    (code,) = re.findall(r"```python\n([^`]*def act.*?)```", TEXT, re.S)
    exec(code, space := {})
    actions = space["act"](torch.rand(2, 8, 6, 3), "Put the Cup away")
    assert (
        seen == [("In: What action should the robot take to put the cup away?\nOut:", (6, 8))] * 2
    )
    moves = [-0.03 * 35, 0.01 * 35, 1.75, 0, 0.1 * 5.6, -1.4]
    expected = torch.tensor([[*moves, -1, 0, 0, 0], [*moves, 1, 0, 0, 0]])
    torch.testing.assert_close(actions, expected)


def test_the_table_names_every_file():
    shown = re.findall(r"^\| `(\w+\.py)` \|", TEXT, re.M)
    assert sorted(shown) == sorted(p.name for p in ROOT.glob("*.py"))


SCRIPTS = ["train_dit", "train_adapter", "evaluate", "data", "world_model", "encoders"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_of_every_flag_its_value_and_meaning(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    toy = getattr(script, "TOY", None)
    monkeypatch.setenv("COLUMNS", "90")
    for default, words in [(None, ["--help"])] + [(toy, ["toy", "-h"])] * bool(toy):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as stop:
            data.parse_args(script.Args, toy)
        said = capsys.readouterr().out
        assert not stop.value.code and len(said.split("  --")[0]) > 20  # what the script does
        flags = dict(re.findall(r"^  --(\w+) (.+(?:\n {42}.+)*)", said, re.M))
        nested = dataclasses.fields(AdapterConfig) if name == "train_adapter" else ()
        asked = [f for f in dataclasses.fields(script.Args) if f.name != "adapter"]
        assert {*flags} == {f.name for f in (*asked, *nested)}
        for field in asked:
            value, shown = getattr(default, field.name, field.default), flags[field.name]
            if isinstance(value, (int, float, str)):
                assert shown.startswith(str(value))
                shown = shown[len(str(value)) :]
            assert len(shown.strip()) > 3  # the comment
        assert max(map(len, said.partition("  --")[2].splitlines())) <= 90


def test_a_reader_that_has_seen_enough_of_the_help_ends_it_quietly():
    words = [sys.executable, str(Path(data.__file__)), "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_help_shows_the_groups_of_the_config(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--help"])
    with pytest.raises(SystemExit):
        data.parse_args(importlib.import_module("train_dit").Args)
    groups = re.findall(r"\n\n(.+)\n  --", capsys.readouterr().out)
    assert groups == ["data", "latent space", "model", "objective", "optimisation", "run"]
