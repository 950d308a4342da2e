"""`DistillationTrainer`: a transformers Trainer whose loss is the blend of losses.py, with rates per parameter.

What differs from the plain Trainer: the loss (CE and KL on chunks of logits that are never held whole, CKA on the
layers), the parameter groups (regex multipliers; a frozen parameter is not in the optimizer), the order of the rows (as
given), checkpoints in the model's own weight names, and the log names total_loss, ce_loss, kl_loss (nats at the
temperature, without T^2) and cka_loss.

Shape suffixes: B rows of a micro-batch, S tokens of a row, T tokens, D model, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from moe_edge.contracts.config import LrMultiplier
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.alignment import TeacherLayers, alignment_loss, listening
from moe_edge.distillation.checkpoints import load_weights
from moe_edge.distillation.losses import active_weights, token_losses
from moe_edge.distillation.schedule import multipliers_of, rate_factor
from moe_edge.distillation.signal import SignalSource, TeacherSignal
from moe_edge.families.taps import body, head

LOG_NAMES = {"ce": "ce_loss", "kl": "kl_loss", "cka": "cka_loss"}


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """TrainingArguments plus the blend; suited to a short local run: no reports, no network."""

    distillation_alpha: float = field(default=0.5, metadata={"help": "0 = plain fine-tuning, 1 = pure distillation"})
    distillation_temperature: float = field(default=2.0, metadata={"help": "temperature of the KL term"})
    loss_weights: dict[str, float] = field(default_factory=lambda: {"ce": 1.0, "kl": 1.0})

    def __post_init__(self) -> None:
        self.report_to = []
        self.disable_tqdm = True
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        super().__post_init__()


class RowDataset(Dataset[dict[str, Tensor]]):
    """Token rows in a given order; every token but a row's first is a label."""

    def __init__(self, ids_NS: np.ndarray, order: Sequence[int] | None = None) -> None:
        self._ids_NS, self._order = ids_NS, list(range(len(ids_NS)) if order is None else order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_S = torch.from_numpy(self._ids_NS[self._order[index]]).long()
        return {"input_ids": ids_S, "labels": ids_S}


class DistillationTrainer(Trainer):
    """Trains a student on text, on a teacher's signal, or on both.

    Args:
        model: the student.
        args: DistillationTrainingArguments.
        train_dataset: rows as `RowDataset` yields them, trained in their order.
        lr_multipliers: first match wins; mappings or LrMultiplier. None: everything at the full rate.
        signal: where the teacher's word comes from; needed when the KL term is on.
        teacher: the teacher's layers; needed when the CKA term is on.
        vocab: true vocabulary; the head's rows beyond it are padding.

    Raises:
        ConfigError: a loss lacks what it needs, a pattern has no effect, or nothing would be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DistillationTrainingArguments,
        train_dataset: Dataset[dict[str, Tensor]],
        lr_multipliers: Sequence[LrMultiplier | Mapping[str, Any]] | None = None,
        signal: SignalSource | None = None,
        teacher: TeacherLayers | None = None,
        vocab: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.weights = active_weights(args.loss_weights, args.distillation_alpha, args.distillation_temperature)
        for name, given in (("kl", signal), ("cka", teacher)):
            if name in self.weights and given is None:
                raise ConfigError(f"the loss '{name}' needs the teacher", where="DistillationTrainer")
        rows = [row if isinstance(row, LrMultiplier) else LrMultiplier(**row) for row in lr_multipliers or ()]
        self._multipliers = multipliers_of([name for name, _ in model.named_parameters()], rows)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._multipliers[name] > 0)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens here
        self.signal, self.teacher, self.vocab = signal, teacher, vocab
        self._sums: dict[str, float] = {}
        self._aligned_step = -1

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group per multiplier; frozen parameters are in none."""
        if self.optimizer is None:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    by_rate.setdefault(self._multipliers[name], []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = self.args.learning_rate
            groups = [{"params": group, "lr": rate * multiplier} for multiplier, group in by_rate.items()]
            self.optimizer = kind(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up and cosine without a step at rate 0; see `rate_factor`."""
        if self.lr_scheduler is None:
            factor = partial(
                rate_factor, steps=num_training_steps, warmup_steps=self.args.get_warmup_steps(num_training_steps)
            )
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss: token losses over the step's token count, CKA once per step."""
        ids_BS = inputs["input_ids"]
        aligns = "cka" in self.weights and self._aligned_step != self.state.global_step
        inner = self.accelerator.unwrap_model(model)
        layers = self.teacher.layers if aligns and self.teacher else []
        with listening(inner, layers) as heard:
            hidden_BSD = body(inner)(input_ids=ids_BS, use_cache=False).last_hidden_state
        tokens = int(num_items_in_batch) if num_items_in_batch is not None else ids_BS[:, 1:].numel()
        loss, sums = self._token_loss(inner, hidden_BSD, ids_BS)
        loss = loss / tokens
        for name, value in sums.items():
            self._add(name, value / tokens)
        if aligns and self.teacher:
            self._aligned_step = self.state.global_step
            distance = alignment_loss(heard, self.teacher.features(ids_BS))
            self._add("cka", float(distance.detach()))
            loss = loss + self.weights["cka"] * distance
        return (loss, {"last_hidden_state": hidden_BSD}) if return_outputs else loss

    def _token_loss(self, model: nn.Module, hidden_BSD: Tensor, ids_BS: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Position j is judged on token j + 1 and on the teacher's row j; the last position of a row has no label."""
        if not {"ce", "kl"} & set(self.weights):
            return hidden_BSD.new_zeros(()), {}
        signal = None
        if "kl" in self.weights and self.signal is not None:
            temperature = self.args.distillation_temperature
            signal = TeacherSignal.joined([self.signal.signal(ids_S, temperature)[:-1] for ids_S in ids_BS])
        return token_losses(
            hidden_BSD[:, :-1].flatten(0, 1),
            head(model).weight[: self.vocab],
            ids_BS[:, 1:].flatten(),
            signal,
            self.weights,
            self.args.distillation_temperature,
        )

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to what the Trainer logs after every step."""
        if "loss" in logs:
            logs["total_loss"] = logs.pop("loss")
            logs |= {LOG_NAMES[name]: value for name, value in self._sums.items()}
            self._sums = {}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The weights under their names in memory, so that loading them needs no conversion; no pickled arguments."""
        self.model.save_pretrained(output_dir or self.args.output_dir, save_original_format=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(model or self.model, Path(resume_from_checkpoint))
