"""`optimum-cli export moe-edge` is found by Optimum's own command line and really exports a model."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.tiny import tiny_checkpoint

TOP = Path(__file__).parent.parent
REGISTER = TOP / "moe_edge" / "optimum_register"
NAMESPACE = "optimum.commands.register"
installed = importlib.util.find_spec("optimum") is not None and importlib.util.find_spec("optimum.commands") is not None
needs_optimum = pytest.mark.skipif(not installed, reason="optimum is not installed: pip install 'moe-edge[optimum]'")


def test_the_package_list_installs_the_registration_where_optimum_looks():
    setup = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert TOP / setup["package-dir"][NAMESPACE] == REGISTER and NAMESPACE in setup["packages"]
    assert not (REGISTER / "__init__.py").exists()  # a namespace package, as optimum demands


def registered() -> bool:
    """Is moe-edge installed in a way that has the registration (and not only run from its checkout)?"""
    return importlib.util.find_spec(NAMESPACE) is not None and any(
        (Path(place) / "register_moe_edge.py").exists()
        for place in importlib.util.find_spec(NAMESPACE).submodule_search_locations
    )


@pytest.fixture
def optimum_cli(tmp_path):
    """optimum-cli in a process; from a plain checkout the registration is put where an installation puts it."""
    paths = [str(TOP)]
    if not registered():
        shutil.copytree(REGISTER, tmp_path / "site" / "optimum" / "commands" / "register")
        paths.append(str(tmp_path / "site"))
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip

    return call


@needs_optimum
def test_optimum_lists_the_command_without_loading_torch(optimum_cli):
    done = optimum_cli("export", "moe-edge", "--help")
    assert done.returncode == 0 and "--target" in done.stdout and "--model" in done.stdout, done.stderr
    assert "moe-edge" in optimum_cli("export", "--help").stdout


@needs_optimum
def test_it_exports_a_model_and_keeps_the_exit_codes(optimum_cli, tmp_path):
    model = tiny_checkpoint(tmp_path, "qwen3_moe", tied=True)
    small = (
        "export.formats=[gguf]",
        "export.gguf.types=[Q8_0]",
        "target.runtime.threads=1",
        "target.context_length=64",
    )
    settings = [word for setting in small for word in ("--set", setting)]
    done = optimum_cli("export", "moe-edge", "--model", model, "--target", "cpu", *settings, "--json", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)["artifacts"]
    assert (
        row["quantization"] == "Q8_0"
        and "token_embd.weight" in check_gguf_header(tmp_path / "out" / row["path"]).tensors
    )
    assert (tmp_path / "out/artifacts/bundle/gguf/run.py").is_file()
    done = optimum_cli("export", "moe-edge", "--model", tmp_path / "absent", tmp_path / "out2")
    assert done.returncode == 2 and "absent" in done.stderr
