"""README: every command it shows parses, and its table of files is complete."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

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


def test_the_table_names_every_file():
    shown = re.findall(r"^\| `(\w+\.py)` \|", TEXT, re.M)
    assert sorted(shown) == sorted(p.name for p in ROOT.glob("*.py"))
