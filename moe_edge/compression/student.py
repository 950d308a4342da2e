"""Writing a student: model/, a plain transformers checkpoint, and what belongs beside it.

The student is written beside its final name, loaded again, compared with the model in memory (the difference must be exactly
0) and renamed; a killed run leaves no half-written model/. Beside model/, where they apply: shared_core/ (the trainable form
of a student with shared cores), merges.json (every proposed pair and why it was or was not merged), layers.json (what each
layer's output misses), imatrix.safetensors (what the new down projections read).

Shape suffixes: S tokens of a row, V vocabulary.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.importance import FILE as IMPORTANCE
from moe_edge.compression.importance import save_importance
from moe_edge.compression.layers import Applied
from moe_edge.contracts.errors import MoeEdgeError
from moe_edge.models.loading import save_student
from moe_edge.models.students import TRAINABLE, is_shared_core, load_student, plain_form, save_trainable
from moe_edge.storage.checkpoint import refuse_nonfinite
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.folders import written_beside

CHECK_TOKENS = 16
MERGES, LAYERS = "merges.json", "layers.json"


def write_student(applied: Applied, tokenizer_source: Path, out: Path) -> float:
    """Write model/ and what belongs beside it; returns the largest logits difference after reloading, which is 0.

    Raises:
        InputRejected: a weight of the student is NaN or infinite, from absurd ones of the teacher; nothing was written.
    """
    model = applied.model
    model.to("cpu")  # type: ignore[arg-type]  # transformers hides nn.Module.to
    for name, parameter in model.named_parameters():
        refuse_nonfinite(parameter.detach(), f"the compressed student: {name}")
    difference = 0.0
    remove_others(out)
    if is_shared_core(model):
        save_trainable(model, tokenizer_source, out / TRAINABLE)
        difference = check_reload(model, out / TRAINABLE)
    plain = plain_form(model)
    with written_beside(out / "model") as folder:
        save_student(plain, tokenizer_source, folder)
        difference = max(difference, check_reload(plain, folder))
    save_importance(out, applied.down_energy)
    for name, records in ((MERGES, applied.pairs), (LAYERS, applied.layers)):
        if records:
            write_json_atomic(out / name, records)
    return difference


def remove_others(out: Path) -> None:
    """What an earlier run with another plan may have left beside model/."""
    shutil.rmtree(out / TRAINABLE, ignore_errors=True)
    for name in (MERGES, LAYERS, IMPORTANCE):
        (out / name).unlink(missing_ok=True)


def check_reload(model: PreTrainedModel, folder: Path) -> float:
    """The reload difference, which is 0.

    Raises:
        MoeEdgeError: the reloaded model differs, so that saving or the disk is broken.
    """
    difference = reload_difference(model, folder)
    if difference != 0.0:
        why = f"largest logits difference {difference}, expected exactly 0"
        raise MoeEdgeError("the saved student differs from the one in memory", where=str(folder), why=why)
    return difference


@torch.inference_mode()
def reload_difference(model: PreTrainedModel, folder: Path) -> float:
    """Largest absolute logits difference on a few tokens between `model` and what `folder` loads to, in its dtype."""
    ids_1S = torch.arange(CHECK_TOKENS)[None] * 7919 % model.config.vocab_size
    return float((_logits(model, ids_1S) - _logits(load_student(folder, dtype=model.dtype), ids_1S)).abs().max())


def _logits(model: PreTrainedModel, ids_1S: Tensor) -> Tensor:
    logits_1SV: Tensor = model(ids_1S).logits
    return logits_1SV[0].float()
