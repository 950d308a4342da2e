"""compress: the plan applied to the teacher; writes model/, a plain transformers checkpoint.

The teacher is loaded in its own dtype, so that every tensor which the plan does not touch keeps its bytes. The student
is written beside its final name, loaded again, compared with the model in memory (the difference must be exactly 0)
and renamed; a killed run leaves no half-written model/. Legend: S sequence, V vocabulary.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.contracts.plan import Plan
from moe_edge.families import family_of
from moe_edge.families.counting import describe_model
from moe_edge.families.loading import load_model, save_student, stored_dtype
from moe_edge.storage.checkpoint import inspect_checkpoint

log = logging.getLogger(__name__)
CHECK_TOKENS = 16


def run(context: StageContext) -> dict[str, Any]:
    """Write `context.out / model`; returns what the student is: params_total, params_active, experts, top_k, bytes, ...

    Raises:
        ConfigError: there is no readable plan, or it does not fit the teacher; raised before any weight is read.
        InputRejected: the teacher cannot be used.
    """
    plan = read_plan(context.inputs["plan"] / "plan.json")
    headers = inspect_checkpoint(context.teacher)
    spec = family_of(headers.config).spec(headers.config)
    check_plan(plan, spec.moe.experts, spec.layers)
    model = load_model(context.teacher, dtype=stored_dtype(headers))
    apply_plan(model, plan)
    difference = write_checked(model, context.teacher, context.out / "model")
    summary = describe_model(inspect_checkpoint(context.out / "model"))
    log.info("compress: %d of %d experts per layer kept", summary["experts"], plan.experts_total)
    return summary | {"reload_max_difference": difference, "teacher": describe_model(headers)}


def read_plan(path: Path) -> Plan:
    """The plan, which a user may have edited. Raises ConfigError when it is missing or contradicts itself."""
    try:
        return Plan.read(path)
    except OSError as error:
        raise ConfigError("there is no plan", where=str(path), next_command="moe-edge plan") from error
    except (ValidationError, ValueError) as error:
        raise ConfigError("the plan cannot be used", where=str(path), why=str(error)) from error


def write_checked(model: PreTrainedModel, tokenizer_source: Path, folder: Path) -> float:
    """Save, reload, compare, rename; returns the largest logits difference, which is 0.

    Raises:
        MoeEdgeError: the reloaded model differs, so that saving or the disk is broken; `folder` is not written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_student(model, tokenizer_source, temporary)
    difference = reload_difference(model, temporary)
    if difference != 0.0:
        why = f"largest logits difference {difference}, expected exactly 0"
        raise MoeEdgeError("the saved student differs from the one in memory", where=str(temporary), why=why)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return difference


@torch.inference_mode()
def reload_difference(model: PreTrainedModel, folder: Path) -> float:
    """Largest absolute logits difference on a few tokens between `model` and what `folder` loads to, in its dtype."""
    ids_1S = torch.arange(CHECK_TOKENS)[None] * 7919 % model.config.vocab_size
    expected_SV = model(ids_1S).logits[0].float()
    actual_SV = load_model(folder, dtype=model.dtype)(ids_1S).logits[0].float()
    return float((expected_SV - actual_SV).abs().max())
