"""The commands that the pages show exist, with the options that they are given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import fixpoint_cli.command
import fixpoint_diffusion.cli

ROOT = Path(__file__).parents[2]
PROGRAMS = {"fixpoint": fixpoint_cli.command.app, "fixpoint-diffusion": fixpoint_diffusion.cli.app}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "examples").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of each line of a bash block that starts one of our programs, by its name or by torchrun."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^(torchrun|accelerate launch) .*-m fixpoint_diffusion ", "fixpoint-diffusion ", x) for x in lines]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words and words[0] in PROGRAMS]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    for program, *words in commands(page):
        command = typer.main.get_command(PROGRAMS[program])
        while hasattr(command, "commands"):
            name, *words = words
            assert name in command.commands, f"{program} {name}"
            command = command.commands[name]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"{program} {command.name}: {sorted(given - known)}"
