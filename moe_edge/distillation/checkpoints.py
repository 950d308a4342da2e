"""Trainer checkpoints that survive kill -9: which one is whole, what is in it, and when to write the next.

A checkpoint folder counts only with its marker, which is written after everything else; only then are older ones
deleted. How often one is written depends on the clock, what is in it does not, so that a resumed run ends with the
same bits.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.distillation.terms import Stateful
from moe_edge.storage.tensor_files import load_tensors, load_weights_file, save_tensors

MARKER = "complete"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"  # of training whose weights are not sharded
EXTRAS = "extras.safetensors"  # the state of whatever else was trained, such as a teacher's routers
SAVE_INTERVAL_S = 120.0


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage, or None."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into `model`, every one of them, also where FSDP has sharded it.

    Raises:
        InputRejected: it is no whole file.
        MoeEdgeError: it does not fit the model.
    """
    what = "a training checkpoint does not fit the student"
    try:
        weights = load_weights_file(checkpoint / WEIGHTS)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            options = StateDictOptions(full_state_dict=True, strict=False)
            result = set_model_state_dict(model, {**weights}, options=options)
        else:
            result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise MoeEdgeError(what, where=str(checkpoint), why=str(error).splitlines()[0]) from error
    tied = getattr(model, "all_tied_weights_keys", {})  # of this model; the class names those of all configurations
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        why = f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
        raise MoeEdgeError(what, where=str(checkpoint), why=why)


def require_same_sharding(checkpoint: Path, sharded: bool) -> None:
    """Raises ConfigError where the optimizer's state cannot be read, which the Trainer would pass over in silence."""
    if sharded == (checkpoint / OPTIMIZER).is_file():
        raise ConfigError(
            "training that began with sharded weights cannot go on without, nor the other way round",
            where=str(checkpoint),
            next_command="launch it as it began, or begin again with --fresh",
        )


def save_extras(checkpoint: Path, parts: Mapping[str, Stateful]) -> None:
    """Write the state of `parts`, each under its name; no file where there is none."""
    tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state().items()}
    if tensors:
        save_tensors(checkpoint / EXTRAS, tensors, {})


def load_extras(checkpoint: Path, parts: Mapping[str, Stateful]) -> None:
    """Give every part its state back; raises InputRejected where the checkpoint has none."""
    tensors = load_tensors(checkpoint / EXTRAS)[0] if parts else {}
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        part.restore(own)


def step_lines(state: TrainerState) -> list[dict[str, float]]:
    """The log of the steps, without evaluations and the summary at the end."""
    return [entry for entry in state.log_history if "total_loss" in entry]


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    """The log of every step up to a checkpoint."""
    return step_lines(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))


def _wait(args: TrainingArguments) -> None:
    """Return when all processes have come here."""
    if args.world_size > 1:
        PartialState().wait_for_everyone()


def _mark(folder: Path, step: int) -> None:
    """The checkpoint of `step` is whole: mark it, and delete all others."""
    newest = folder / f"checkpoint-{step}"
    (newest / MARKER).touch()
    for other in folder.glob("checkpoint-*"):
        if other != newest:
            shutil.rmtree(other)


class SaveByTheClock(TrainerCallback):
    """Asks for a checkpoint every two minutes and after the last step; keeps only the newest. Of several processes the
    first one's clock decides for all, and it alone marks and deletes, when all have written their parts.

    Args:
        interval_s: 0 saves after every step.
    """

    def __init__(self, interval_s: float = SAVE_INTERVAL_S) -> None:
        self._interval_s, self._last_s = interval_s, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = [time.monotonic() - self._last_s >= self._interval_s]
        if args.world_size > 1:
            broadcast_object_list(due)
        control.should_save = due[0] or state.global_step >= state.max_steps
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _wait(args)
        if args.should_save:
            assert args.output_dir is not None
            _mark(Path(args.output_dir), state.global_step)
        _wait(args)
        self._last_s = time.monotonic()
