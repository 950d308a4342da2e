"""`DistillationTrainer`: a transformers Trainer whose loss is the blend of losses.py, with rates per parameter.

What differs from the plain Trainer: the loss (on chunks of logits that are never held whole, and terms that read
layers, experts and routers), the parameter groups (regex multipliers; a frozen parameter is not in the optimizer), the
order of the rows (as given), hooks that see a step's micro-batches before they are trained on (rows that the student
writes, a router step of the teacher), checkpoints in the model's own weight names, and the log names total_loss, ce_loss,
kl_loss (nats at the temperature, without T^2) and so on.

Shape suffixes: B rows of a micro-batch, S tokens of a row, T tokens, D model, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from moe_edge.contracts.config import LrMultiplier
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.checkpoints import load_extras, load_weights, require_same_sharding, save_extras
from moe_edge.distillation.losses import LOSSES, TokenLosses, active_weights, of_kind
from moe_edge.distillation.schedule import multipliers_of, rate_factor
from moe_edge.distillation.signal import SignalSource, joined
from moe_edge.distillation.teacher import LiveTeacher, head_weight
from moe_edge.distillation.terms import BatchHook, MicroBatch, Observer, Stateful, TeacherActivations, Term
from moe_edge.formulas.divergence import predicts_label
from moe_edge.models.taps import hidden_states

Batch = dict[str, Tensor]


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """TrainingArguments plus the blend; the defaults suit a short local run: no reports, no network."""

    report_to: None | str | list[str] = field(default="none", metadata={"help": "as TrainingArguments"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "as TrainingArguments"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "as TrainingArguments; a NaN is shown"})
    distillation_alpha: float = field(default=0.5, metadata={"help": "0 = plain fine-tuning, 1 = pure distillation"})
    distillation_temperature: float = field(default=2.0, metadata={"help": "temperature of the divergences"})
    loss_weights: dict[str, float] = field(default_factory=lambda: {"ce": 1.0, "kl": 1.0})
    jsd_beta: float = field(default=0.5, metadata={"help": "weight of the teacher in the mixture of 'jsd'"})
    skew: float = field(default=0.1, metadata={"help": "share of the other side in the skewed divergences"})

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # rows carry what the losses read, which the student's forward does not know
        super().__post_init__()  # type: ignore[no-untyped-call]


class RowDataset(Dataset[Batch]):
    """Token rows in a given order; every token but a row's first is a label."""

    def __init__(self, ids_NS: np.ndarray, order: Sequence[int] | None = None) -> None:
        self._ids_NS, self._order = ids_NS, list(range(len(ids_NS)) if order is None else order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Batch:
        ids_S = torch.from_numpy(self._ids_NS[self._order[index]]).long()
        return {"input_ids": ids_S, "labels": ids_S}


@dataclass(frozen=True)
class Parts:
    """What takes part in training besides student and data.

    `draws`: how often the teacher is asked about a micro-batch (knowledge augmentation); the losses are averaged.
    """

    terms: Sequence[Term] = ()
    hooks: Sequence[BatchHook] = ()
    observers: Sequence[Observer] = ()
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    draws: int = 1


class DistillationTrainer(Trainer):
    """Trains a student on text, on a teacher's signal, or on both.

    Args:
        model: the student.
        args: DistillationTrainingArguments.
        train_dataset: rows as `RowDataset` yields them, trained in their order.
        lr_multipliers: first match wins; mappings or LrMultiplier. None: everything at the full rate.
        signal: the teacher's word from a cache.
        teacher: the teacher in memory; its word goes before the cache's, and terms may want more of it.
        parts: terms, hooks and observers.
        vocab: true vocabulary; the head's rows beyond it are padding.

    Raises:
        ConfigError: a loss lacks what it needs, a pattern has no effect, or nothing would be trained.
    """

    args: DistillationTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: DistillationTrainingArguments,
        train_dataset: Dataset[Batch],
        lr_multipliers: Sequence[LrMultiplier | Mapping[str, Any]] | None = None,
        signal: SignalSource | None = None,
        teacher: LiveTeacher | None = None,
        parts: Parts | None = None,
        vocab: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.weights = active_weights(args.loss_weights, args.distillation_alpha, args.distillation_temperature)
        self.signal, self.teacher, self.parts, self.vocab = signal, teacher, parts or Parts(), vocab
        self._check_parts()
        rows = [row if isinstance(row, LrMultiplier) else LrMultiplier(**row) for row in lr_multipliers or ()]
        self._multipliers = multipliers_of([name for name, _ in model.named_parameters()], rows)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._multipliers[name] > 0)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens here
        self._token_losses = TokenLosses(self.weights, args.distillation_temperature, args.jsd_beta, args.skew)
        self._sums: dict[str, float] = {}
        self._judged_step, self._summed_steps = -1, 0

    def _check_parts(self) -> None:
        live = self.teacher is not None and self.teacher.has_logits
        given = {term.name for term in self.parts.terms}
        for name in self.weights:
            kind = LOSSES[name].kind
            if kind == "divergence" and self.signal is None and not live or kind == "term" and name not in given:
                raise ConfigError(
                    f"the loss '{name}' needs the teacher",
                    where="DistillationTrainer",
                    why="no cached signal, no live teacher with logits and no term of this name is given",
                    next_command="give signal=, teacher= or parts=, or alpha 0 to train on the text alone",
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group per multiplier; frozen parameters are in none."""
        if self.optimizer is None:
            assert isinstance(self.model, PreTrainedModel)
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
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        rows = train_dataset or self.train_dataset
        assert isinstance(rows, Sized)
        return SequentialSampler(rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """A step's micro-batches after the hooks have seen them, and the tokens in them that have a label."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for hook in self.parts.hooks:
            batches = hook(batches, self.state.global_step)
        return (batches, self._get_num_items_in_batch(batches, device)) if self.parts.hooks else (batches, items)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss: token losses over the step's token count, and the terms."""
        inner, training = self.accelerator.unwrap_model(model), model.training
        terms = self._due(training)
        recorders: list[Term | Observer] = [*terms, *(self.parts.observers if training else ())]
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.recording(inner))
            hidden_BSD = hidden_states(model, inner, inputs["input_ids"], inputs.get("attention_mask"))
        chosen_BS = predicts_label(inputs["labels"])
        labelled, processes = int(chosen_BS.sum()), self._processes(num_items_in_batch)
        tokens = max(1, labelled if num_items_in_batch is None else int(num_items_in_batch))
        loss, sums = self._token_loss(inner, hidden_BSD, inputs, chosen_BS)
        loss = loss * (processes / tokens)
        parts = {name: value * processes / tokens for name, value in sums.items()}
        for term, value in self._judged(terms, inputs):
            share = 1.0 if term.sampled else labelled * processes / tokens
            parts[term.name] = float(value.detach()) * share
            loss = loss + self.weights[term.name] * share * value
        if training:
            self._add(parts)
        return (loss, {"last_hidden_state": hidden_BSD}) if return_outputs else loss

    def _processes(self, num_items_in_batch: Tensor | int | None) -> int:
        """How many processes' tokens the count holds: gradients are averaged over processes, which it must make up for."""
        together = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if together else 1

    def _due(self, training: bool) -> list[Term]:
        """The terms that judge this micro-batch: sampled ones only a step's first; an evaluation asks all of them."""
        wanted = [term for term in self.parts.terms if term.name in self.weights]
        if not training:
            return wanted
        first = self._judged_step != self.state.global_step
        self._judged_step = self.state.global_step
        self._summed_steps += first
        return [term for term in wanted if first or not term.sampled]

    def _judged(self, terms: Sequence[Term], inputs: Batch) -> Iterator[tuple[Term, Tensor]]:
        if not terms:
            return
        ids_BS, mask_BS = inputs["input_ids"], inputs.get("attention_mask")
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        wanted = self.teacher is not None and any(term.needs for term in terms)
        answer = self.teacher.run(ids_BS, mask_BS) if wanted and self.teacher else TeacherActivations()
        batch = MicroBatch(ids_BS, valid_BS, answer)
        for term in terms:
            yield term, term.loss(batch)

    def _token_loss(
        self, model: nn.Module, hidden_BSD: Tensor, inputs: Batch, chosen_BS: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Position j is judged on token j + 1 and on the teacher's row j; the last position of a row has no label."""
        if not of_kind(self.weights, "labels", "divergence"):
            nothing = 0.0 * hidden_BSD.float().sum()  # a micro-batch that no term judges has a gradient, too: zero
            if self.accelerator.num_processes > 1:  # which wait for the gradients of every parameter, the head's too
                nothing = nothing + 0.0 * head_weight(model).float().sum()
            return nothing, {}
        own_words = "rollout" in inputs  # text that the student wrote is no target
        labels_T = None if own_words else inputs["labels"][:, 1:][chosen_BS[:, :-1]]
        weight_VD = head_weight(model, self.vocab)
        return self._token_losses(hidden_BSD[chosen_BS], weight_VD, labels_T, self._signals(inputs, chosen_BS))

    def _signals(self, inputs: Batch, chosen_BS: Tensor) -> list[Any]:
        """The teacher on the chosen positions, once per draw."""
        if not of_kind(self.weights, "divergence"):
            return []
        ids_BS = inputs["input_ids"]
        if self.teacher is not None and self.teacher.has_logits:
            draws = (self.teacher.run(ids_BS, inputs.get("attention_mask"), draw) for draw in range(self.parts.draws))
            return [self.teacher.signal(one, chosen_BS, self.vocab) for one in draws]
        assert self.signal is not None
        temperature = self.args.distillation_temperature
        pairs = zip(ids_BS, chosen_BS, strict=True)
        return [joined([self.signal.signal(ids_S, temperature)[chosen_S] for ids_S, chosen_S in pairs])]

    def _add(self, parts: Mapping[str, float]) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value / self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, means over the steps since the last line, and what observers saw."""
        if "loss" in logs:
            logs["total_loss"], steps = logs.pop("loss"), max(1, self._summed_steps)
            logs |= {f"{name}_loss": value / steps for name, value in self._over_processes(self._sums).items()}
            self._sums, self._summed_steps = {}, 0
            for observer in self.parts.observers:
                logs |= observer.read()
        super().log(logs, start_time)

    def _over_processes(self, sums: Mapping[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return dict(sums)
        names = sorted(self.weights)  # of all, because a process whose rows are rollouts has no cross-entropy
        values = torch.tensor([sums.get(name, 0.0) for name in names], device=self.args.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student from the main process, its weights gathered where they are sharded over processes."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=self.accelerator.num_processes > 1)
        state: dict[str, Any] = {**get_model_state_dict(self.accelerator.unwrap_model(self.model), options=whole)}
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The weights under their names in memory, so that loading them needs no conversion; no pickled arguments."""
        name = output_dir or self.args.output_dir
        assert name is not None
        folder, student = Path(name), self.accelerator.unwrap_model(self.model)
        if state_dict is not None:  # gathered tensors no longer share memory
            tied = student.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        student.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        save_extras(folder, self.parts.stateful)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        require_same_sharding(Path(resume_from_checkpoint), self.is_fsdp_enabled)
        student = model or self.model
        assert student is not None
        load_weights(student, Path(resume_from_checkpoint))
        load_extras(Path(resume_from_checkpoint), self.parts.stateful)
