"""The README's two commands are where CI looks for them, and what it promises about files and commands exists."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main

from moe_edge.cli.main import app
from moe_edge.families import FAMILIES

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text()


@pytest.mark.parametrize(
    ("number", "words"), [(1, ["pip install -c constraints.txt .", "moe-edge build"]), (2, ["[dev]", "pytest"])]
)
def test_ci_finds_the_commands(number, words):
    script = (TOP / ".ci/run").read_text()
    function = re.search(r"^readme_command\(\) \{.*?^\}", script, re.M | re.S)
    assert function
    done = subprocess.run(
        ["bash", "-c", f"{function[0]}\nreadme_command {number}"], cwd=TOP, capture_output=True, text=True
    )
    assert len(done.stdout.strip().splitlines()) == 1 and all(word in done.stdout for word in words)


def test_every_command_it_names_exists():
    known = set(typer.main.get_command(app).commands)
    named = set(re.findall(r"moe-edge ([a-z-]+)", README))
    assert named and named <= known


def test_it_names_every_family_and_links_to_files_that_exist():
    assert all(f"`{name}`" in README for name in FAMILIES)
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((TOP / link).exists() for link in links)


def test_no_placeholder_is_left():
    assert "@@" not in README
