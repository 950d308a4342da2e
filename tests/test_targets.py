"""Every shipped target loads, is sourced and is documented; wrong ones are explained."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.quantization import RECIPES
from moe_edge.contracts.target import Fact, Hardware, Target
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
    assert target.system == ("android" if name.startswith("mobile") else "linux")
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


UNIT_OF = {
    "_bytes": "bytes", "weights": "bytes", "peak_memory": "bytes", "_gb_per_s": "1e9 bytes/s", "_share": "share",
    "_efficiency": "share", "experts": "share", "_agreement_to_teacher": "share", "context_length": "tokens",
    "context_least": "tokens", "ttft": "seconds", "_tokens_per_s": "tokens/s", "_nats": "nats/token", "_ratio": "ratio",
    "budget.bytes": "share", "cores": "count", "threads": "count", "gpu_layers": "layers",
}  # fmt: skip
FACT_KEYS = {"value", "source", "confidence"}


def documented() -> dict[str, str]:
    """Key -> unit of the README's table."""
    lines = (data_root("targets") / "README.md").read_text().split("## Keys")[1].splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    return {row[0].strip("|` "): row[1] for row in rows}


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a raw file down to its leaves; a constant with its source is one."""
    for name, value in node.items():
        if isinstance(value, dict) and not FACT_KEYS & set(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_the_readme_documents_every_key_of_the_schema_with_its_unit():
    found = documented()
    assert list(found) == list(keys(Target)), "the same keys in the same order"
    assert all(unit and unit != "-" for unit in found.values())
    for key, unit in found.items():
        expected = next((word for end, word in UNIT_OF.items() if key.endswith(end)), None)
        assert expected is None or unit.startswith(expected), (key, unit)
    kinds = {key: str(field.annotation) for key, field in keys(Target).items()}
    numbers = [key for key, kind in kinds.items() if re.search(r"\b(int|float)\b", kind) and "Literal" not in kind]
    assert len(numbers) > 10
    assert all(any(key.endswith(end) for end in UNIT_OF) for key in numbers), numbers


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_file_is_documented_and_every_constant_sourced(name):
    """Read as plain YAML, so that what the schema would fill in does not count."""
    raw = YAML(typ="safe").load((data_root("targets") / f"{name}.yaml").read_text())
    found, allowed = dict(leaves(raw)), set(get_args(Fact.model_fields["confidence"].annotation))
    assert set(found) <= set(documented())
    facts = {key: value for key, value in found.items() if key.startswith("hardware.")}
    assert set(facts) == {f"hardware.{name}" for name in Hardware.model_fields}
    for key, fact in facts.items():
        assert set(fact) == FACT_KEYS and len(fact["source"]) > 5 and fact["confidence"] in allowed, key


def test_the_readme_has_a_row_for_every_target():
    text = (data_root("targets") / "README.md").read_text().split("## Keys")[0]
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == sorted(
        SHIPPED, key=text.index
    )
    assert all(text.count(f"| `{name}` |") == 1 for name in SHIPPED)


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
