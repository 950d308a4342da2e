"""Layer by layer the sums and the logits are those of the pass with the whole model, also after a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_edge.profiling import layerwise
from moe_edge.profiling.passes import SHARD_ROWS, STATE
from moe_edge.profiling.sums import PassSums, merged
from tests.profiling.runs import ROWS, TOKENS, Killed, flat, layerwise_pass, same_bits, whole_pass
from tests.tiny import ALL_FAMILIES, tiny_checkpoint


def _assert_close(found: PassSums, expected: PassSums) -> None:
    one, other = flat(found), flat(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(one[name], tensor), name
        else:
            scale = float(tensor.abs().max())
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sums_and_logits_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, layers=4, dtype=torch.bfloat16)
    logits: dict[str, list[torch.Tensor]] = {"whole": [], "layerwise": []}
    whole = whole_pass(folder, tmp_path / "w", lambda _, x: logits["whole"].append(x))
    found = layerwise_pass(folder, tmp_path / "l", lambda _, x: logits["layerwise"].append(x))
    _assert_close(found, whole)
    torch.testing.assert_close(torch.stack(logits["layerwise"]), torch.stack(logits["whole"]), rtol=1e-5, atol=1e-5)


def test_half_precision_is_spilled_without_loss(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2_moe", with_tokenizer=False, dtype=torch.bfloat16)
    whole = whole_pass(folder, tmp_path / "w", dtype=torch.bfloat16)
    _assert_close(layerwise_pass(folder, tmp_path / "l", dtype=torch.bfloat16), whole)


def test_shares_of_several_processes_add_up(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False)
    parts = [layerwise_pass(folder, tmp_path / str(rank), rank=rank, world=4) for rank in range(4)]
    saved = [PassSums.load(tmp_path / str(rank) / STATE)[0] for rank in range(4)]
    assert all(same_bits(part, other) for part, other in zip(parts, saved, strict=True))
    _assert_close(merged(saved), whole_pass(folder, tmp_path / "w"))


def _dying(calls: int, work: Any) -> Any:
    """`work`, which dies in its `calls`-th call."""
    seen: list[int] = []

    def dies(*arguments: Any, **keywords: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            raise Killed
        return work(*arguments, **keywords)

    return dies


@pytest.mark.parametrize("killed_in", ["embedding", "layer 0", "layer 1", "saving layer 1", "after layer 1"])
def test_a_killed_pass_resumes_bit_identically(killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False)
    whole = layerwise_pass(folder, tmp_path / "whole")
    batches = -(-SHARD_ROWS // 4) * 2 + 1
    with monkeypatch.context() as patch:
        if killed_in == "embedding":
            patch.setattr(layerwise.StreamedModel, "embed", _dying(2, layerwise.StreamedModel.embed))
        elif killed_in == "saving layer 1":
            patch.setattr(layerwise, "save_tensors", _dying(2, layerwise.save_tensors))
        elif killed_in == "after layer 1":
            patch.setattr(Path, "unlink", _dying(2, Path.unlink))
        else:
            calls = 2 if killed_in == "layer 0" else batches + 2
            patch.setattr(layerwise.StreamedModel, "step", _dying(calls, layerwise.StreamedModel.step))
        with pytest.raises(Killed):
            layerwise_pass(folder, tmp_path / "killed")
    steps: list[int] = []
    step = layerwise.StreamedModel.step
    monkeypatch.setattr(
        layerwise.StreamedModel, "step", lambda self, index, *rest: steps.append(index) or step(self, index, *rest)
    )
    assert same_bits(layerwise_pass(folder, tmp_path / "killed"), whole)
    expected = {"embedding": {0, 1}, "layer 0": {0, 1}, "after layer 1": set()}.get(killed_in, {1})
    assert set(steps) == expected


def test_a_pass_killed_at_the_logits_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False)
    whole = layerwise_pass(folder, tmp_path / "whole")
    seen: list[bytes] = []

    def die(ids_S: np.ndarray, logits_SV: torch.Tensor) -> None:
        seen.append(ids_S.tobytes())
        if len(seen) == SHARD_ROWS + 3:
            raise Killed

    with pytest.raises(Killed):
        layerwise_pass(folder, tmp_path / "killed", die)
    again: list[bytes] = []
    assert same_bits(layerwise_pass(folder, tmp_path / "killed", lambda x, _: again.append(x.tobytes())), whole)
    assert again[:3] == seen[SHARD_ROWS:] and len(again) == ROWS - SHARD_ROWS
    finished = layerwise_pass(folder, tmp_path / "killed", lambda *_: pytest.fail("no row is left"))
    assert same_bits(finished, whole)


def test_a_state_of_another_identity_is_not_resumed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False)
    layerwise_pass(folder, tmp_path / "p", cka_tokens=0)
    rows: list[int] = []
    sums = layerwise_pass(folder, tmp_path / "p", lambda *_: rows.append(1), identity="b")
    assert len(rows) == ROWS and sums.model["tokens"] == ROWS * TOKENS and sums.model["cka_tokens"] > 0
