"""Configuration: layers merge in the documented order, and a wrong key is answered with its line and the nearest known one."""

import pytest

from moe_edge.contracts.config_io import merge, parse_setting, read_yaml, resolve_config
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.targets_io import read_target


def resolve(tmp_path, text="", settings=(), flags=None, target="cpu"):
    file = None
    if text:
        (tmp_path / "build.yaml").write_text(text)
        file = read_yaml(tmp_path / "build.yaml")
    return resolve_config(read_target(target), file, list(settings), flags)


def test_defaults_come_with_a_target(tmp_path):
    config = resolve(tmp_path)
    assert config.target.name == "cpu" and config.target.budget.experts == pytest.approx(0.625)
    assert config.calibration.tokens == 65536 and config.plan.criterion == "auto"


def test_precedence_file_then_set_then_flags(tmp_path):
    text = "plan: {experts: 9, seed: 3}\nteacher: {path: a}\n"
    config = resolve(tmp_path, text, ["plan.experts=7", "teacher.path=b"], {"teacher": {"path": "c"}})
    assert (config.plan.experts, config.plan.seed, config.teacher.path) == (7, 3, "c")


def test_units_are_parsed(tmp_path):
    config = resolve(
        tmp_path, settings=["target.budget.weights=4GiB", "target.budget.ttft=250ms", "target.budget.experts=50%"]
    )
    budget = config.target.budget
    assert (budget.weights, budget.ttft, budget.experts) == (4 << 30, 0.25, 0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{stage_name: a, losess: {kl: 1}}]", r"unknown key 'distill\.stages\.0\.losess'; did you mean 'losses'\?"),
        ("atuo", r"distill\.stages: Input should be 'auto'"),
        ("3", r"distill\.stages: Input should be a valid list"),
    ],
)
def test_a_keyword_beside_a_list_blurs_no_message(value, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        resolve_config(read_target("cpu"), None, [f"distill.stages={value}"])
    assert len(str(refusal.value).splitlines()) == 2  # one complaint, whichever of both was meant


def test_unknown_key_names_line_and_nearest(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, "calibration:\n  seed: 1\n  tokns: 5\n")
    assert "line 3" in str(caught.value) and "did you mean 'tokens'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_wrong_value_names_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"plan\.seed.*line 2"):
        resolve(tmp_path, "plan:\n  seed: many\n")


def test_a_config_cannot_name_a_target_as_text(tmp_path):
    with pytest.raises(ConfigError, match="target"):
        resolve(tmp_path, settings=["target=cpu"])


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "- 1\n- 2\n", "\tplan: 1\n"])
def test_bad_yaml_is_one_clear_error(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="YAML|mapping"):
        read_yaml(tmp_path / "bad.yaml")


def test_missing_and_huge_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_text("a: " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_yaml(tmp_path / "huge.yaml")


@pytest.mark.parametrize("text", ["plan.experts", "=5", "plan..x=1", "plan.experts=[1"])
def test_bad_settings_are_refused(text):
    with pytest.raises(ConfigError):
        parse_setting(text)


def test_merge_replaces_lists_and_joins_mappings():
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}


BOMB = "a: &a [x, x, x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)).replace(
    "*a0", "*a"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: &p {seed: 3}\ncalibration:\n  <<: *p\n", r"line 3: merge keys .*write the keys out"),
        ("plan: {<<: {seed: 3}}", "line 1: merge keys"),
        (BOMB, "line 2: aliases"),
        ("plan: &p {x: *p}", "aliases"),
        ("[" * 3000, "levels of nesting"),
        ("plan: " + "{a: " * 2000 + "1" + "}" * 2000, "levels of nesting"),
        ("plan: [" + "x," * 20_000 + "]", "nodes"),
        ("".join(f"key{i}: 1\n" for i in range(1000)), "unknown key 'key19'(?s:.*)and 980 more$"),
        ("target: {budget: {weights: 1e999GiB}}", "weights: '1e999GiB' is not a finite number"),
        ("target: {budget: {ttft: 1e999s}}", "'1e999s' is not a finite number"),
        ("plan: {max_kl_nats: .inf}", "max_kl_nats: inf is not a finite number .*line 1"),
        ("plan: {max_kl_nats: .nan}", "max_kl_nats: nan is not a finite number"),
        ('teacher: {path: "a\\0b"}', r"teacher\.path: a NUL character"),
        ('"a\\0b": 1', "a NUL character"),
    ],
)
def test_hostile_yaml_is_refused_before_it_grows(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        resolve(tmp_path, text)
    assert len(str(refusal.value)) < 8000


@pytest.mark.parametrize(
    "setting",
    ["plan.seed=" + "[" * 3000, "plan.seed=" + "9" * 5000, "plan=&a {b: *a}", "target.budget.weights=1e999GiB"]
    + ["plan.max_kl_nats=.inf", 'teacher.path="a\\0b"', ".".join("a" * 3000) + "=1"],
)
def test_a_hostile_setting_is_one_clear_error(tmp_path, setting):
    with pytest.raises(ConfigError):
        resolve(tmp_path, settings=[setting])
