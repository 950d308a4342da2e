"""Opening and writing checkpoint folders: exact, deterministic, offline, and closed to foreign code."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.families import family_of
from moe_edge.models.loading import (
    complete_student,
    load_config,
    load_model,
    load_tokenizer,
    resolve_teacher,
    save_student,
    stored_dtype,
    student_config,
)
from moe_edge.models.pruning import prune
from moe_edge.models.streaming import StreamedModel
from moe_edge.storage.checkpoint import checkpoint_digest, inspect_checkpoint
from moe_edge.storage.files import read_json, sha256_file
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_ids, tiny_model

KEPT = {0: [0, 2, 3, 5], 1: [1, 2, 3, 4]}


def edit_config(folder: Path, **changes: object) -> Path:
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_checkpoint_loads_to_the_model_that_was_saved(tmp_path: Path, family: str) -> None:
    model = load_model(tiny_checkpoint(tmp_path, family, with_tokenizer=False))
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(family)(ids).logits)
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_students_have_the_same_bytes_every_time(tmp_path: Path, family: str, tied: bool) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16, tied=tied)
    digests = []
    for name in ("one", "two"):
        model = load_model(teacher, dtype=torch.bfloat16)
        prune(model, KEPT)
        save_student(model, teacher, tmp_path / name)
        digests.append({path.name: sha256_file(path) for path in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(digests[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_untouched_tensors_keep_their_bytes(tmp_path: Path, family: str) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    model = load_model(teacher, dtype=stored_dtype(inspect_checkpoint(teacher)))
    prune(model, KEPT)
    save_student(model, teacher, tmp_path / "student")
    old, new = load_file(teacher / "model.safetensors"), load_file(tmp_path / "student" / "model.safetensors")
    plain = [name for name in old if ".experts." not in name and not name.endswith(".gate.weight")]
    assert plain and all(torch.equal(old[name], new[name]) and new[name].dtype == torch.bfloat16 for name in plain)
    moved = [name for name in old if ".0.mlp.experts.5." in name or ".0.block_sparse_moe.experts.5." in name]
    assert len(moved) == 3 and all(
        torch.equal(old[name], new[name.replace("experts.5.", "experts.3.")]) for name in moved
    )


def test_a_student_loads_without_moe_edge(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    model = load_model(teacher)
    prune(model, KEPT)
    save_student(model, teacher, tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("the fox")["input_ids"] == load_tokenizer(teacher)("the fox")["input_ids"]
    assert tokenizer.chat_template == load_tokenizer(teacher).chat_template


def test_generation_settings_are_copied_even_when_transformers_would_refuse_them(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "olmoe")
    settings = '{"do_sample": false, "temperature": 0.7, "eos_token_id": [2, 1]}'
    (teacher / "generation_config.json").write_text(settings)
    model = load_model(teacher)
    assert model.generation_config.eos_token_id == [2, 1]
    save_student(model, teacher, tmp_path / "student")
    assert (tmp_path / "student" / "generation_config.json").read_text() == settings
    assert model.generation_config.temperature == 0.7
    (teacher / "generation_config.json").unlink()
    save_student(model, teacher, tmp_path / "student")
    assert not (tmp_path / "student" / "generation_config.json").exists()


def test_the_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint(tmp_path, "mixtral"))
    text = "Größer als 42 €, the fox\n\tjumps"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 512
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_rejected(tmp_path: Path, content: str | None) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputRejected, match="tokenizer cannot be read") as caught:
        load_tokenizer(folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "own_moe", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ({"model_type": "llama", "num_experts": None}, "unknown model family"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"num_hidden_layers": 3}, "lacks tensors"),
        ({"num_hidden_layers": 1}, "unknown tensors"),
        ({"vocab_size": 300}, "contradicts config.json"),
        ({"attention_dropout": "often"}, "transformers refuses"),
    ],
)
def test_what_does_not_load(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False), **changes)
    with pytest.raises(InputRejected, match=word) as caught:
        load_model(folder)
    assert caught.value.exit_code == 4


def test_integer_weights_are_a_quantized_checkpoint(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputRejected, match="quantized checkpoint"):
        load_model(folder)


def test_mixed_dtypes_are_kept_without_loss(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t if "gate" in n else t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    assert stored_dtype(headers) == torch.float32
    model = load_model(folder, dtype=stored_dtype(headers))
    assert torch.equal(model.model.layers[0].mlp.gate.weight, tensors["model.layers.0.block_sparse_moe.gate.weight"])


def test_sharded_students_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_edge.models.loading.SHARD_SIZE", "200KB")
    teacher = tiny_checkpoint(tmp_path, "qwen2_moe")
    model = load_model(teacher)
    save_student(model, teacher, tmp_path / "student")
    assert len(list((tmp_path / "student").glob("model-*.safetensors"))) > 1
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "student")(ids).logits, model(ids).logits)


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_teacher(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("text", ["./none", "/none/at/all", "~/none-at-all", "a/b/c", "", "a\\b"])
def test_a_missing_folder_is_never_asked_of_the_hub(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="not a folder"):
        resolve_teacher(text)


def test_the_hub_is_asked_for_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def fake(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_teacher("owner/name", "v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in p or "py" in p or p == "*" for p in patterns)


def test_a_silent_hub_is_a_usage_error_with_advice() -> None:
    with pytest.raises(ConfigError, match="hf download owner/no-such-model") as caught:
        resolve_teacher("owner/no-such-model")
    assert caught.value.exit_code == 2


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("qwen3_moe", {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            "glm4_moe",
            {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e6, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            "deepseek_v3",
            {"rope_theta": 1e5} | YARN,
            {"rope_theta": 1e5, "rope_scaling": YARN | {"type": "yarn"}},
        ),
        (
            "minimax_m2",
            {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
            {"rope_theta": 5e6, "rope_scaling": None, "partial_rotary_factor": 0.5, "rotary_dim": 8},
        ),
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    ],
)
def test_a_students_rotation_stands_under_the_older_keys_too(
    family: str, given: dict[str, object], expected: dict[str, object]
) -> None:
    config = {"model_type": family, "head_dim": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
    written = student_config(config | {"rope_parameters": {"rope_type": "default"} | given})
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
    assert {key: written[key] for key in old if key in written} == expected


def test_older_keys_leave_the_rotation_of_a_student_as_it_is(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3", with_tokenizer=False)
    given = {"rope_theta": 1e5, "beta_fast": 32.0, "beta_slow": 1.0} | YARN
    edit_config(folder, rope_parameters=given, rope_scaling=None, rope_theta=None)
    before = load_config(inspect_checkpoint(folder, require_tokenizer=False))
    edit_config(folder, **student_config(read_json(folder / "config.json")))
    after = load_config(inspect_checkpoint(folder, require_tokenizer=False))
    assert {**after.rope_parameters, "type": "yarn"} == {**before.rope_parameters, "type": "yarn"}


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe", "lfm2_moe", "qwen3_5_moe"])
def test_a_stored_head_counts_although_the_config_ties_it(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, tied=False)
    ids = tiny_ids(vocab=64)
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
        edit_config(folder, tie_word_embeddings=True)
        model = load_model(folder)
        assert torch.equal(model(ids).logits, expected)
    found = inspect_checkpoint(folder)
    assert not family_of(found.config).spec(found.config).tied_embeddings
    with StreamedModel(folder) as streamed, streamed.loaded("head"):
        assert torch.equal(streamed.model.lm_head.weight, model.lm_head.weight)
    save_student(model, folder, tmp_path / "student")
    assert read_json(tmp_path / "student" / "config.json")["tie_word_embeddings"] is False


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", tied=True)
    tensors = load_file(folder / "model.safetensors")
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect_checkpoint(folder).config["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", ["deepseek_v2", "minimax_m2", "qwen3_moe"])
def test_the_code_of_a_model_that_transformers_has_is_ignored_and_left_out(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    ids = tiny_ids(vocab=64)
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
        classes = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
        edit_config(folder, auto_map=classes)
        for name in ("configuration_evil.py", "modeling_evil.py"):
            (folder / name).write_text("raise SystemExit('executed')\n")
        model = load_model(folder)
        assert torch.equal(model(ids).logits, expected)
    load_config(inspect_checkpoint(folder))
    assert sum("auto_map is ignored" in record.message for record in caplog.records) == 1
    save_student(model, folder, tmp_path / "student")
    assert "auto_map" not in read_json(tmp_path / "student" / "config.json")
    assert not list((tmp_path / "student").glob("*.py"))


def test_named_chat_templates_belong_to_the_checkpoint_and_reach_the_student(tmp_path: Path) -> None:
    folder, student = tiny_checkpoint(tmp_path, "mixtral"), tmp_path / "student"
    before = checkpoint_digest(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }} with tools")
    assert checkpoint_digest(folder) != before
    student.mkdir()
    (student / "config.json").write_bytes((folder / "config.json").read_bytes())
    complete_student(folder, student)
    templates = load_tokenizer(student).chat_template
    assert templates["tool_use"].endswith("with tools") and templates["default"]
