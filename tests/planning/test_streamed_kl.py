"""Layer by layer the masked KL is that of the model in memory, for every family and for compact experts, too."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.models.loading import load_model
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.views import moe_layers
from moe_edge.planning.masking import masked_kl, masked_kl_rows
from moe_edge.planning.streamed_kl import streamed_masked_kl, streamed_masked_kl_rows
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_it_equals_the_masked_kl_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, layers=3, dtype=torch.bfloat16)
    model, ids = load_model(folder), tiny_ids(12, 6)
    groups = moe_layers(model)[0].groups[0]
    layers = [view.index for view in moe_layers(model)]
    fewer = [0, 1, 2, 3, 4] if groups == 1 else [0, 1, 3, 4]
    choices = [{}, dict.fromkeys(layers, fewer), {layers[-1]: fewer}]
    expected = masked_kl_rows(model, choices, ids)
    for compact in (False, True):
        teacher = StreamedModel(folder, compact=compact)
        found = streamed_masked_kl_rows(teacher, choices, ids, tmp_path)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert found[1].mean() > 1e-4 and found[0].abs().max() < 1e-6
    assert not list(tmp_path.glob("masked-*"))


def test_named_choices_and_another_top_k(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2_moe", with_tokenizer=False)
    choices = {"a": {0: [0, 1, 2], 1: [3, 4, 5]}, "b": {}, "again": {0: [0, 1, 2], 1: [3, 4, 5]}}
    expected = masked_kl(load_model(folder), choices, tiny_ids(12, 5), top_k=1)
    found = streamed_masked_kl(StreamedModel(folder), choices, tiny_ids(12, 5), tmp_path, top_k=1)
    assert list(found) == list(expected)
    for name, result in expected.items():
        assert found[name].kl_nats == pytest.approx(result.kl_nats, rel=1e-4)
        assert found[name].ci95 == pytest.approx(result.ci95, rel=1e-3) and found[name].n_tokens == 60


def test_an_impossible_choice_is_refused_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = StreamedModel(tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False))
    monkeypatch.setattr(teacher, "loaded", lambda part: pytest.fail("read"))
    with pytest.raises(ConfigError):
        streamed_masked_kl_rows(teacher, [{0: [0]}], tiny_ids(), tmp_path)
