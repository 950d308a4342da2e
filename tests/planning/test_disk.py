"""What a build will write: from headers alone, per stage, without what lies there already."""

import shutil
from types import SimpleNamespace

import pytest

from moe_edge.api import configure, find_checkpoint
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.planning import disk
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.disk import refuse_full_disk, room_for_build, stage_bytes
from moe_edge.storage import folders
from tests.qwen3_30b import write_headers_only

GIB = 1 << 30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A 30 B teacher of 61 GB, of which only the headers are real."""
    return write_headers_only(tmp_path_factory.mktemp("qwen3"))


def sizes(teacher, linked=True, **overrides):
    config = configure("cpu", teacher, overrides={key.replace("__", "."): value for key, value in overrides.items()})
    return stage_bytes(header_plan(find_checkpoint(config).headers, config), config, linked=linked)


def test_only_what_will_be_written_is_asked_for(large, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda: 1 << 50)
    full, untrained = sizes(large), sizes(large, distill__stages=[])
    gguf_alone = sizes(large, distill__stages=[], export__formats=["gguf"], export__bundle=False)
    assert full["distill"] > 12 * 19e9 and untrained["distill"] == 0
    assert sizes(large, linked=False, distill__stages=[])["distill"] == untrained["compress"]
    assert 36 < untrained["compress"] / GIB < 37.5  # 62.5 % of the experts, as they are stored
    assert gguf_alone["export"] < untrained["export"] and gguf_alone["artifacts"] == 0
    assert sum(gguf_alone.values()) < 2 * 61e9  # six times the teacher was asked for, whatever was written


def test_the_default_recipe_asks_for_no_checkpoint_that_memory_cannot_train(large, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda: 24 * GIB)
    assert sizes(large)["distill"] == 0
    assert sizes(large, distill__stages=[{"stage_name": "mine", "share": 1.0}])["distill"] > 12 * 19e9


def test_what_lies_there_is_not_asked_for_again(tmp_path, monkeypatch):
    (tmp_path / "compress").mkdir()
    (tmp_path / "compress" / "half.tmp").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 << 20))
    assert "about 1.0 MiB will be written" in refuse_full_disk(tmp_path, {"compress": 4 << 20})
    with pytest.raises(
        ResourceProblem, match=r"about 5\.0 MiB will be written \(compress 3\.0 MiB, export 2\.0 MiB\), 2\.0"
    ):
        refuse_full_disk(tmp_path, {"compress": 6 << 20, "export": 2 << 20})
    shutil.rmtree(tmp_path / "compress")


def test_a_build_asks_for_the_stages_that_it_runs(large, tmp_path, monkeypatch):
    config = configure("cpu", large, overrides={"distill.stages": []})
    budget = header_plan(find_checkpoint(config).headers, config)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * GIB))
    assert "profile" in room_for_build(tmp_path, budget, config, ("profile", "plan"))
    with pytest.raises(ResourceProblem, match="compress 36"):
        room_for_build(tmp_path, budget, config, ("profile", "plan", "compress"))
    assert not list(tmp_path.iterdir())  # no probe is left
