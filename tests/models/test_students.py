"""Students that are not plain mixtures: written, reloaded, and refused when their folder is not what it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.ffn import Ffn
from moe_edge.models import shared_core
from moe_edge.models.dense import DENSE_OF, build_dense
from moe_edge.models.loading import save_student
from moe_edge.models.students import (
    describe_student,
    load_student,
    mirror_student,
    plain_form,
    save_trainable,
    trainable_folder,
    use_fastest_experts,
)
from moe_edge.storage import checkpoint
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_ids, tiny_model

IDS = tiny_ids()


def shared_student(family: str = "qwen3_moe", **options: object):
    model = shared_core.shared_core_model(tiny_model(family, **options), rank=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared_core" in name or "wrapper" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "qwen3_moe", name="source")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_trainable_form_reloads_here_and_its_plain_form_everywhere(tmp_path, tokenizer, family, tied):
    model = shared_student(family, tied=tied)
    save_trainable(model, tokenizer, tmp_path / "shared_core")
    assert torch.equal(logits(load_student(tmp_path / "shared_core")), logits(model))
    plain = plain_form(model)
    save_student(plain, tokenizer, tmp_path / "model")
    assert plain.config.model_type == family
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(plain))
    assert torch.equal(logits(load_student(tmp_path / "model")), logits(plain))
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert trainable_folder(tmp_path).name == "shared_core"
    mirror_student(tmp_path, tmp_path / "twin")
    assert torch.equal(logits(load_student(trainable_folder(tmp_path / "twin"))), logits(model))
    use_fastest_experts(model)
    use_fastest_experts(plain)


def test_users_of_transformers_load_it_with_the_modeling_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shared_student("olmoe")
    save_trainable(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_shared_core.py").read_bytes() == Path(shared_core.__file__).read_bytes()
    assert "moe_edge." not in (tmp_path / "out" / "modeling_shared_core.py").read_text()
    outside = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(outside).__module__.startswith("transformers_modules")
    assert torch.equal(logits(outside), logits(model))


def test_our_loader_runs_no_file_of_the_folder(tmp_path, tokenizer):
    model = shared_student()
    save_trainable(model, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "modeling_shared_core.py").write_text("raise SystemExit('executed')\n")
    assert torch.equal(logits(load_student(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"auto_map": {**checkpoint.SHARED_CORE_AUTO_MAP, "AutoTokenizer": "evil.Tokenizer"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "auto_map": checkpoint.SHARED_CORE_AUTO_MAP}},
    ],
)
def test_another_auto_map_is_refused(tmp_path, tokenizer, change):
    save_trainable(shared_student(), tokenizer, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputRejected, match="its own code"):
        load_student(tmp_path / "out")


def test_the_two_tables_agree():
    assert shared_core.AUTO_MAP == checkpoint.SHARED_CORE_AUTO_MAP
    assert shared_core.MODEL_TYPE == checkpoint.SHARED_CORE_TYPE


@pytest.mark.parametrize(
    ("base", "word"), [("nonsense", "unknown family"), ("qwen3", "unknown family"), ("mixtral", "does not fit")]
)
def test_a_wrong_base_or_missing_tensors_are_refused(tmp_path, tokenizer, base, word):
    save_trainable(shared_student(), tokenizer, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_type": base}))
    with pytest.raises(InputRejected, match=word):
        load_student(tmp_path / "out")


def dense_student(family: str = "qwen3_moe"):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 64), (40, 64), (64, 40)]
    networks = [Ffn(*(0.1 * torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(2)]
    return build_dense(model, networks)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_a_dense_student_reloads_and_is_described(tmp_path, tokenizer, family):
    model = dense_student(family)
    assert plain_form(model) is model
    save_student(model, tokenizer, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(model))
    assert torch.equal(logits(load_student(tmp_path / "model")), logits(model))
    told = describe_student(inspect_checkpoint(tmp_path / "model"))
    assert told["family"] == DENSE_OF[family] and (told["experts"], told["top_k"], told["params_routed"]) == (1, 1, 0)
    assert told["params_total"] == told["params_active"] == sum(parameter.numel() for parameter in model.parameters())
    assert trainable_folder(tmp_path).name == "model"
    use_fastest_experts(model)


def test_a_dense_checkpoint_with_a_missing_tensor_is_refused(tmp_path, tokenizer):
    save_student(dense_student(), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputRejected, match="does not fit its config.json"):
        load_student(tmp_path / "model")
