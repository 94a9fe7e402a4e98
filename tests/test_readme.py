"""README: every command it shows parses, and its table of files is complete."""

import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data

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
