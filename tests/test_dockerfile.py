"""The Dockerfile as text: multi-stage, pinned, non-root, no secrets, nothing that old builders refuse; hadolint agrees."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
TEXT = (TOP / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def lines():
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser(fileobj=(TOP / "Dockerfile").open("rb"))
    return [(row["instruction"], row["value"]) for row in parser.structure]


def values(lines, instruction):
    return [value for name, value in lines if name == instruction]


def test_two_stages_from_one_pinned_base(lines):
    assert len(values(lines, "FROM")) == 2
    (base,) = [value for value in values(lines, "ARG") if value.startswith("BASE_IMAGE=")]
    assert re.search(r":\d+\.\d+\.\d+", base)


def test_runs_as_a_numbered_user_that_is_not_root(lines):
    assert values(lines, "USER")[-1] == "10001"


def test_entrypoint_is_the_command(lines):
    assert values(lines, "ENTRYPOINT") == ['["moe-edge"]']


def test_nothing_secret_and_nothing_new_for_old_builders(lines):
    joined = " ".join(value for name, value in lines if name in ("ARG", "ENV"))
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY=", joined, re.I)
    assert "<<" not in TEXT and "--link" not in TEXT


def test_every_copied_path_exists_and_is_not_ignored(lines):
    ignored = (TOP / ".dockerignore").read_text().split()
    for value in values(lines, "COPY"):
        for source in value.split()[:-1]:
            assert (TOP / source).exists() and source not in ignored


def test_torch_comes_pinned_from_the_cpu_index():
    assert re.search(r"^torch==\d", (TOP / "constraints.txt").read_text(), re.M)
    assert "whl/cpu" in TEXT


def test_hadolint_passes():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install -e .[dev])")
    done = subprocess.run([hadolint, str(TOP / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
