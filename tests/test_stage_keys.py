"""A stage's key holds every setting that its function reads, and none that it does not: found by watching real stages read.

A tiny teacher is built from end to end with configurations that write down which keys were looked at.
"""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from moe_edge import pipeline
from moe_edge.api import configure, find_checkpoint, open_teacher
from moe_edge.planning.allocation import header_plan
from tests.tiny import tiny_checkpoint

SETTINGS = {
    "calibration.tokens": 1024,
    "calibration.sequence_length": 64,
    "profile.cka_tokens": 128,
    "plan.tokens": 128,
    "plan.curve_tokens": 64,
    "plan.sensitivity_tokens": 64,
    "plan.search_tokens": 500,
    "plan.action_tokens": 256,
    "plan.max_kl_nats": 50.0,
    "distill.tokens": 256,
    "validate.tokens": 256,
    "validate.prompt_tokens": 16,
    "validate.new_tokens": 4,
    "validate.repetitions": 1,
    "target.runtime.threads": 1,
}


SAID_ONLY = {"target.name"}  # in an error's text


class Watched:
    """A pydantic model that remembers the dotted keys of the values that are taken from it."""

    def __init__(self, model: BaseModel, seen: set[str], path: str = "") -> None:
        self.__dict__.update(_model=model, _seen=seen, _path=path)

    def __getattr__(self, name: str) -> Any:
        model, seen, path = self._model, self._seen, self._path
        field = type(model).model_fields.get(name)
        value = getattr(model, name)
        if field is None:
            return self._method(name, value) if callable(value) else value
        key = f"{path}.{field.alias or name}".lstrip(".")
        if isinstance(value, BaseModel):
            return Watched(value, seen, key)
        seen.add(key)
        return value

    def _method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "model_copy":
                changes = {key: _bare(value) for key, value in (options.get("update") or {}).items()}
                return Watched(self._model.model_copy(update=changes), self._seen, self._path)
            if name == "model_dump":
                self._seen.add(self._path)
            return method(*arguments, **options)

        return call


def _bare(value: Any) -> Any:
    return value._model if isinstance(value, Watched) else value


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Stage -> the keys that it read while a tiny teacher was built."""
    folder = tmp_path_factory.mktemp("keys")
    teacher = tiny_checkpoint(folder, "qwen3_moe", experts=8, width=64, hidden=64)
    config = configure("cpu", teacher, overrides=SETTINGS)
    found: dict[str, set[str]] = {stage.name: set() for stage in pipeline.STAGES}

    def watched(name: str) -> pipeline.StageRun:
        def run(given: Any, *arguments: Any, **more: Any) -> Any:
            return pipeline.load_stage(name)(Watched(given, found[name]), *arguments, **more)

        return run

    budget = header_plan(find_checkpoint(config).headers, Watched(config, found["plan"]))  # type: ignore[arg-type]
    build = pipeline.Build(
        config, open_teacher(config), folder / "run", given={"plan": {"budget": budget}}, find_stage=watched
    )
    pipeline.run_stages(build)
    return found


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_the_key_holds_what_is_read(reads: dict[str, set[str]], stage: pipeline.Stage) -> None:
    missing = {key for key in reads[stage.name] if not any(f"{key}.".startswith(f"{held}.") for held in stage.reads)}
    assert missing <= SAID_ONLY


def test_a_gate_is_read_by_no_stage(reads: dict[str, set[str]]) -> None:
    assert not [key for keys in reads.values() for key in keys if key.startswith("target.gates")]
    assert any(key.startswith("plan.") for key in reads["plan"]) and "validate.tokens" in reads["validate"]
