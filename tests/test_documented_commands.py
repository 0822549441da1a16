"""The commands of the documentation are commands that the programs take."""

from __future__ import annotations

import re
import shlex

import pytest

from hmn.sweeps import search
from hmn.sweeps.cells import grid
from hmn.sweeps.cli import COMMANDS
from hmn.sweeps.sweep import of_arguments
from hmn.sweeps.table import table_file
from tests.command import ROOT, configured

PAGES = ("README.md", "docs/*.md", "experiments/*/README.md", "benchmarks/README.md")
CODE = re.compile(r"^```sh\n(.*?)^```|`(python [^`]+)`", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python (?:run|sweep)\.py\b[^;]*")  # a shell's loop may be around it
FILLED = {"<run id>": "RUN_ID", "$kind": "direct"}


def documented(text: str) -> list[str]:
    """All commands of a page that start a run or a sweep, with placeholders filled and without comments."""
    found = []
    for block, inline in CODE.findall(text):
        for line in [" ".join(inline.split())] if inline else block.replace("\\\n", "").splitlines():
            for blank, value in FILLED.items():
                line = line.replace(blank, value)
            found += COMMAND.findall(re.sub(r"\s#.*", "", line))
    return [shlex.join(shlex.split(command)) for command in found]


def all_documented() -> list[str]:
    pages = [path.read_text(encoding="utf-8") for pattern in PAGES for path in ROOT.glob(pattern)]
    return sorted({command for page in pages for command in documented(page)})


@pytest.mark.parametrize("command", all_documented())
def test_a_documented_command_is_taken(command):
    _, program, *arguments = shlex.split(command)
    settings = [argument for argument in arguments if "=" in argument and not argument.startswith("hydra")]
    options = {argument for argument in arguments if "=" not in argument}
    assert options <= {*COMMANDS, "-m", "--help", "--json", "--every", "5"}
    experiment = dict(one.split("=", 1) for one in settings).get("experiment")
    if program == "sweep.py" and experiment and table_file(experiment).exists():
        assert of_arguments(settings, command).cells
    elif "search" in options:
        fixed, space = search._parse([one for one in settings if not one.startswith(("study=", "trials=", "batch="))])
        assert configured(*fixed.values()) and space
    else:
        cells = grid(settings)  # one, unless it is a sweep
        assert len(cells) == 1 or program == "sweep.py" or "-m" in options
        assert all(configured(*cell.overrides) for cell in (cells[0], cells[-1]))


def test_commands_are_found_in_blocks_and_lines():
    block = "```sh\nfor i in 1 2; do python sweep.py a=1 \\\n  'b=x  y'; done    # why\nmake demo\n```\n"
    text = f"Run `python run.py\nartifact=runs/<run id>` or\n\n{block}"
    assert documented(text) == ["python run.py artifact=runs/RUN_ID", "python sweep.py a=1 'b=x  y'"]
    assert len(all_documented()) > 60
