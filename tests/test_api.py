"""The public Python API: lazy, typed, and the same code as the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_edge
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.targets_io import read_target
from moe_edge.models.loading import load_model
from moe_edge.models.views import moe_layers
from tests.compression.action_helpers import KEPT, material, plan_of
from tests.tiny import tiny_checkpoint, tiny_ids

SHORT = (  # one row of 64 tokens instead of hundreds
    '"calibration.sequence_length": 64, "plan.search_tokens": 0, "validate.tokens": 256, "validate.new_tokens": 4, '
    '"validate.prompt_tokens": 16, "validate.repetitions": 1, "plan.max_kl_nats": 50.0, "profile.cka_tokens": 128, '
    '"export.formats": ["gguf"], "target.runtime.threads": 1'
)
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    settings = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=settings)


def test_importing_the_package_loads_nothing(tmp_path):
    code = (
        "import sys, moe_edge; print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'pydantic', 'numpy')])"
    )
    assert python(code, tmp_path).stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other():
    found = {name: getattr(moe_edge, name) for name in moe_edge.__all__}
    assert all(callable(found[name]) for name in moe_edge.__all__ if name != "__version__")
    assert found["Config"].__name__ == "BuildConfig" and issubclass(found["MoeEdgeError"], Exception)
    with pytest.raises(AttributeError, match="no attribute 'buidl'"):
        _ = moe_edge.buidl


def test_a_room_never_hides_a_function(tmp_path):
    """A submodule becomes an attribute of the package when it is imported; none may have a public function's name."""
    code = "import moe_edge.exporting.gguf, moe_edge.api; from moe_edge import export; print(type(export).__name__)"
    assert python(code, tmp_path).stdout.strip() == "function"
    rooms = {path.name.removesuffix(".py") for path in Path(moe_edge.__file__).parent.iterdir()}
    assert not rooms & set(moe_edge.__all__)


def test_overrides_are_values():
    config = resolve_config(read_target("cpu"), overrides={"plan.experts": 10, "export.formats": ["gguf"]})
    assert config.plan.experts == 10 and config.export.formats == ["gguf"]
    with pytest.raises(moe_edge.MoeEdgeError, match="did you mean 'experts'"):
        resolve_config(read_target("cpu"), overrides={"plan.exprets": 10})


def test_a_plan_comes_from_headers_alone(tmp_path, monkeypatch):
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", experts=8)
    monkeypatch.setattr("moe_edge.models.loading.load_model", lambda *_: pytest.fail("no weight is read"))
    plan = moe_edge.plan(teacher, overrides={"plan.experts": 5})
    assert (plan.experts_total, plan.experts_kept, plan.top_k, plan.kept) == (8, 5, 2, {})
    assert plan.estimate.file_bytes > 0 and plan.quantization == "Q4_K_M" and plan.criterion == "auto"
    assert type(plan) is moe_edge.Plan


def test_a_model_in_memory_is_compressed(tmp_path):
    teacher = load_model(tiny_checkpoint(tmp_path, "qwen2_moe", width=64))
    given = material(teacher)
    student = moe_edge.compress(teacher, plan_of(KEPT, compensate=True), rows=given.ids_NS, statistics=given.statistics)
    assert [view.count for view in moe_layers(student)] == [len(ids) for ids in KEPT.values()]
    with torch.no_grad():
        assert student(tiny_ids()).logits.isfinite().all()
    with pytest.raises(moe_edge.MoeEdgeError, match="experts"):
        moe_edge.compress(student, plan_of(KEPT))


def test_the_readmes_python_block_runs(tmp_path):
    """In a fresh process from an empty folder, with a tiny model in the place of the demo teacher."""
    (block,) = re.findall(r"<!-- python -->\n```python\n(.*?)```", README, re.S)
    tiny = tiny_checkpoint(tmp_path, "qwen3_moe", experts=8)
    small = f"import pathlib, moe_edge.demo\nmoe_edge.demo.demo_teacher_path = lambda: pathlib.Path({str(tiny)!r})\n"
    shorter = block.replace('"calibration.tokens": 8192', f'"calibration.tokens": 1024, {SHORT}')
    done = python(small + shorter, tmp_path, MOE_EDGE_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and shorter != block, done.stderr
    expected, built, speed, *error = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ \d+ Q4_K_M(-mix)? \d+", expected) and built.startswith(("pass ", "fail "))
    artifact = Path(built.rsplit(" ", 1)[1])
    report = json.loads((tmp_path / "runs/from-python/report.json").read_text())
    assert (tmp_path / artifact).is_file() and report["verdict"] == built.split()[0]
    assert all(float(number) > 0 for number in speed.split()) and "no/such/folder" in "".join(error)
