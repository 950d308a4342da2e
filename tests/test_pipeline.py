"""The pipeline: skip on equal keys, rebuild on changed files, resume after a kill, adopt hand edits with --from."""

import inspect
import json
from typing import get_type_hints

import pytest

from moe_edge import pipeline
from moe_edge.contracts.artifacts import FOLDERS
from moe_edge.contracts.checkpoint import CheckpointHeaders, Teacher
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.targets_io import read_target
from moe_edge.families import family_of
from tests.qwen3_30b import CONFIG
from tests.summaries import summary_of

SPEC = family_of(CONFIG).spec(CONFIG)


class Stages:
    """Fake stages that count their runs and write one file each."""

    def __init__(self):
        self.runs, self.saw = [], {}
        self.fail_in = None

    def __call__(self, name):
        def run(config, teacher, out, **earlier):
            self.runs.append(name)
            if self.fail_in == name:
                (out / "half").write_text("unfinished")
                raise RuntimeError("killed")
            (out / f"{name}.json").write_text(json.dumps({"saw": sorted(earlier)}))
            self.saw[name] = earlier
            return summary_of(name)

        return run


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    return Stages()


def run(tmp_path, stages, settings=(), start=None, until=None, fresh=False, out="run"):
    config = resolve_config(read_target("cpu"), None, list(settings))
    headers = CheckpointHeaders(tmp_path, {}, {}, 0)
    teacher = Teacher(tmp_path, "teacher", headers, SPEC, "sha256:teacher")
    state = pipeline.Build(config, teacher, tmp_path / out, fresh=fresh, find_stage=stages)
    pipeline.run_stages(state, start, until)
    return state


def test_all_stages_run_once_then_nothing(tmp_path, stages):
    first = run(tmp_path, stages)
    assert stages.runs == list(pipeline.STAGE_NAMES) and not any(first.cached.values())
    second = run(tmp_path, stages)
    assert len(stages.runs) == len(pipeline.STAGES) and all(second.cached.values())


def test_a_stage_is_given_the_typed_folders_that_it_takes(tmp_path, stages):
    state = run(tmp_path, stages)
    for stage in pipeline.STAGES:
        folders = stages.saw[stage.name]
        assert {name: type(folder) for name, folder in folders.items()} == {name: FOLDERS[name] for name in stage.takes}
        assert all(folder.digest == state.manifests[name].digest for name, folder in folders.items())


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_a_stages_signature_says_what_the_table_says(stage):
    """The table hands folders over by name; the function takes those and no others, each with its type."""
    given = {"plan": {"budget"}}.get(stage.name, set())
    parameters = inspect.signature(pipeline.load_stage(stage.name)).parameters
    assert list(parameters)[:3] == ["config", "teacher", "out"]
    hints = get_type_hints(pipeline.load_stage(stage.name))
    assert set(parameters) - {"config", "teacher", "out"} == {*stage.takes, *given}
    assert {name: hints[name] for name in stage.takes} == {name: FOLDERS[name] for name in stage.takes}


@pytest.mark.parametrize(
    "setting",
    [
        "target.gates.kl_to_teacher_nats=0.001",
        "target.description=another",
        "target.hardware.memory_bytes.source=someone",
        "target.system=android",
        "export.bundle=false",
    ],
)
def test_what_no_stage_reads_runs_no_stage(tmp_path, stages, setting):
    run(tmp_path, stages)
    stages.runs.clear()
    run(tmp_path, stages, [setting])
    assert stages.runs == []


def test_a_changed_setting_runs_only_what_depends_on_it(tmp_path, stages):
    run(tmp_path, stages)
    stages.runs.clear()
    run(tmp_path, stages, ["validate.tokens=512"])
    assert stages.runs == ["validate"]


def test_equal_output_stops_the_chain(tmp_path, stages):
    """A new seed runs distill again; its digest is the same, so export is reused."""
    run(tmp_path, stages)
    stages.runs.clear()
    run(tmp_path, stages, ["distill.seed=1"])
    assert stages.runs == ["distill"]


def test_a_changed_file_is_noticed_and_kept(tmp_path, stages, caplog):
    run(tmp_path, stages)
    stages.runs.clear()
    (tmp_path / "run/plan/plan.json").write_text("edited")
    run(tmp_path, stages)
    assert stages.runs == ["plan"]
    assert (tmp_path / "run/plan.modified/plan.json").read_text() == "edited"
    assert "changed since it was written" in caplog.text


def test_from_builds_on_a_hand_edit(tmp_path, stages):
    run(tmp_path, stages)
    stages.runs.clear()
    (tmp_path / "run/plan/plan.json").write_text("edited")
    state = run(tmp_path, stages, start="compress")
    assert stages.runs == ["compress", "distill", "export", "validate"]
    assert (
        state.manifests["plan"].edited and state.manifests["compress"].inputs["plan"] == state.manifests["plan"].digest
    )
    stages.runs.clear()
    run(tmp_path, stages)
    assert stages.runs == []  # the edit is now what the manifest says


def test_a_killed_stage_finds_its_own_files_and_failures_are_not_cached(tmp_path, stages):
    stages.fail_in = "compress"
    with pytest.raises(RuntimeError):
        run(tmp_path, stages)
    folder = tmp_path / "run/compress"
    assert read_manifest(folder) is None and (folder / "half").exists()
    stages.fail_in = None
    state = run(tmp_path, stages)
    assert state.cached == {name: name in ("profile", "plan") for name in pipeline.STAGE_NAMES}
    assert "half" in state.manifests["compress"].files  # resumed in the same folder


def test_another_key_empties_an_unfinished_folder(tmp_path, stages):
    stages.fail_in = "plan"
    with pytest.raises(RuntimeError):
        run(tmp_path, stages)
    stages.fail_in = None
    state = run(tmp_path, stages, ["plan.seed=5"])
    assert "half" not in state.manifests["plan"].files


def test_profiles_are_shared_between_output_folders(tmp_path, stages):
    run(tmp_path, stages, out="a")
    stages.runs.clear()
    state = run(tmp_path, stages, out="b")
    assert "profile" not in stages.runs and state.cached["profile"]


def test_a_damaged_cached_profile_is_not_used(tmp_path, stages):
    run(tmp_path, stages, out="a", until="profile")
    (cached,) = (tmp_path / "cache/profiles").glob("*/profile.json")
    cached.write_text("damage")
    stages.runs.clear()
    run(tmp_path, stages, out="b", until="profile")
    assert stages.runs == ["profile"]


def test_until_and_fresh(tmp_path, stages):
    run(tmp_path, stages, until="plan")
    assert stages.runs == ["profile", "plan"]
    run(tmp_path, stages, until="plan", fresh=True)
    assert stages.runs == ["profile", "plan"] * 2


def test_from_needs_the_earlier_stages(tmp_path, stages):
    with pytest.raises(ConfigError, match="finished 'profile'"):
        run(tmp_path, stages, start="distill")


def test_a_second_build_is_refused_while_the_first_holds_the_folder(tmp_path):
    with pipeline.locked(tmp_path / "run"), pytest.raises(EnvironmentProblem, match="(?s)in use by another build.*pid"):
        with pipeline.locked(tmp_path / "run"):
            pass
    with pipeline.locked(tmp_path / "run"):  # released
        assert (tmp_path / "run/.lock.json").exists()
