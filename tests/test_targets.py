"""Every shipped target loads, is sourced and is documented; wrong ones are explained."""

from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.quantization import RECIPES
from moe_edge.contracts.target import Fact, Target
from moe_edge.contracts.targets_io import describe_target, find_target, list_targets, load_target

SHIPPED = (
    "cpu", "jetson", "jetson-agx-orin-64gb", "jetson-orin-nx-16gb", "jetson-thor", "mobile", "mobile-mid",
    "raspberry-pi-5",
)  # fmt: skip


def test_the_shipped_targets_are_the_eight_of_the_design():
    assert list_targets() == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_is_complete(name):
    target = load_target(name)
    assert target.name == name
    facts = [value for _, value in target.hardware if isinstance(value, Fact)]
    assert len(facts) == 7 and all(len(fact.source) > 5 for fact in facts)
    assert set(target.quantization.gguf) <= set(RECIPES)
    assert target.budget.experts or (target.budget.weights and target.budget.peak_memory)
    gates = target.gates
    assert gates.kl_to_student_nats and gates.kl_to_teacher_nats and gates.top1_agreement_to_teacher
    assert gates.host_speed == (name == "cpu")
    if not gates.host_speed:
        usable = target.hardware.memory_bytes.value * target.hardware.usable_share.value
        assert target.budget.weights < target.budget.peak_memory <= usable


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a target with its field, down to the leaves."""
    found = {}
    for name, field in model.model_fields.items():
        inner, key = field.annotation, prefix + (field.alias or name)
        nested = isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Fact
        found |= keys(inner, key + ".") if nested else {key: field}
    return found


def test_every_key_is_documented_and_shown_with_its_value():
    found = keys(Target)
    assert len(found) > 25 and all(len(field.description or "") > 8 for field in found.values())
    units = {"memory_bytes": "bytes", "bandwidth_gb_per_s": "1e9 bytes", "context_length": "tokens", "ttft": "seconds"}
    for key, unit in units.items():
        assert any(unit in (field.description or "") for name, field in found.items() if name.endswith(key)), key
    shown = describe_target(load_target("jetson")).splitlines()
    assert [line.split()[0] for line in shown] == list(found)
    bandwidth = next(line for line in shown if line.startswith("hardware.bandwidth_gb_per_s"))
    assert bandwidth.split()[1] == "102" and "datasheet" in bandwidth and "JetPack" in bandwidth


@pytest.mark.parametrize("name", SHIPPED)
def test_the_constants_are_consistent(name):
    """Shares are shares, speeds are positive, and what is not measured is not called measured."""
    hardware = load_target(name).hardware
    assert 0 < hardware.usable_share.value <= 1 and 0 < hardware.bandwidth_efficiency.value <= 1
    for fact in (hardware.memory_bytes, hardware.bandwidth_gb_per_s, hardware.cores):
        assert fact.value is None or fact.value > 0
        assert (fact.confidence == "measured") == (fact.value is None), "shipped numbers come from documents"


def test_the_readme_names_every_target_and_every_key():
    text = (data_root("targets") / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SHIPPED)
    for section in ("hardware", "quantization", "runtime", "budget"):
        for key in type(getattr(load_target("cpu"), section)).model_fields:
            assert key in text, key


def test_an_unknown_target_gets_a_suggestion_and_the_list():
    with pytest.raises(ConfigError, match="did you mean 'jetson'") as caught:
        find_target("jetsn")
    assert caught.value.exit_code == 2 and "raspberry-pi-5" in str(caught.value)


def test_a_users_own_file_is_read_and_a_missing_one_is_named(tmp_path):
    mine = tmp_path / "board.yaml"
    mine.write_text(find_target("cpu").read_text().replace("name: cpu", "name: board"))
    assert load_target(str(mine)).name == "board"
    with pytest.raises(ConfigError, match=r"no such target file: .*nowhere\.yaml"):
        find_target(str(tmp_path / "nowhere.yaml"))


def test_a_wrong_key_is_reported_with_its_line(tmp_path):
    mine = tmp_path / "board.yaml"
    lines = find_target("cpu").read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if line.strip().startswith("experts:"))
    lines[at] = lines[at].replace("experts", "expert")
    mine.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load_target(str(mine))
    assert f"line {at + 1}" in str(caught.value) and "did you mean 'experts'" in str(caught.value)


def test_a_wheel_finds_its_targets_where_a_checkout_does():
    assert (data_root("targets") / "cpu.yaml").is_file()
    assert isinstance(data_root("targets"), Path)
