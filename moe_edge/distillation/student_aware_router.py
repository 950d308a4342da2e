"""The student-aware router (SAR): now and then the teacher's routers, and nothing else of it, are trained towards the
student, so that the mixture of all its experts is one the student can follow (Kim et al. 2025, arXiv 2502.12947, eq. 9).

loss = KL(p || q) + beta CV(importance)^2, with p the teacher, every expert active, and q the student, held fixed. The
paper calls this the reverse KL because here the teacher is the model that learns; the student's own reverse KL is
KL(q || p). Its second balance term, the variation of token counts, is constant when every expert is active.

A gradient of the routers runs through the whole teacher. Off the CPU each of its layers is computed again on the way back,
so that only the layers' inputs are kept, and logits are made in chunks.

Beyond the paper: routers in half precision get float32 masters (a step of 1e-5 is lost in bfloat16), and a router that
has drifted too far from its snapshot is put back. The teacher's folder is never written.

Shape suffixes: B rows, S tokens of a row, T tokens, t tokens of a chunk, D model, E experts, V vocabulary, L MoE layers.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional

from moe_edge.contracts.config import StudentAwareRouterConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.teacher import LiveTeacher, head_weight
from moe_edge.distillation.telemetry import RouterSnapshot
from moe_edge.distillation.terms import RecordsNothing
from moe_edge.formulas.divergence import kl_dense, predicts_label
from moe_edge.formulas.head_loss import head_loss
from moe_edge.formulas.routers import every_expert, gate_logprobs, importance_variation
from moe_edge.models.routing import is_sigmoid, rerouted
from moe_edge.models.streaming import recomputed
from moe_edge.models.taps import Activations, body, decoder_layers, recorded_activations
from moe_edge.models.views import moe_layers

log = logging.getLogger(__name__)


class StudentAwareRouter(RecordsNothing):
    """A BatchHook that trains the teacher's routers, Stateful, and an Observer of their loss and drift.

    Args:
        vocab: true vocabulary; columns beyond it are padding. None: as many as both heads have.
        recompute: compute the teacher's layers twice instead of keeping what is inside them; None: not on a CPU.

    Raises:
        ConfigError: the teacher was cut short because nothing else wants its logits.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: LiveTeacher,
        config: StudentAwareRouterConfig,
        vocab: int | None = None,
        recompute: bool | None = None,
    ) -> None:
        if len(decoder_layers(teacher.model)) < teacher.model.config.num_hidden_layers:
            why = "no loss of the stage wants the teacher's logits"
            raise ConfigError("a student-aware router needs a loss on logits", where="distill.stages: losses", why=why)
        self._student, self._teacher, self._config, self._vocab = student, teacher, config, vocab
        self._sigmoid = {view.index: is_sigmoid(view) for view in moe_layers(teacher.model)}
        self.snapshot = RouterSnapshot(teacher.model)
        self._masters = {key: tensor.float().clone() for key, tensor in self.snapshot.tensors.items()}
        self._optimizer = self._new_optimizer()
        on_cpu = next(teacher.model.parameters()).device.type == "cpu"
        self._recompute = not on_cpu if recompute is None else recompute
        self._seen: dict[str, float] = {}

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._masters.values(), lr=self._config.learning_rate, weight_decay=0.0)

    def __call__(self, batches: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        if step % self._config.every == 0:
            self._router_step(batches)
        return batches

    def _router_step(self, batches: list[dict[str, Tensor]]) -> None:
        chosen = [predicts_label(batch["labels"]) for batch in batches]
        tokens = sum(int(chosen_BS.sum()) for chosen_BS in chosen)
        if not tokens:
            return
        inputs: dict[int, Tensor] = {}
        self._seen = {name: value for name, value in self._seen.items() if name == "sar_restored"}
        with self._trainable() as parameters:
            gradients = [torch.zeros_like(master) for master in self._masters.values()]
            for batch, chosen_BS in zip(batches, chosen, strict=True):
                slopes, inputs = self._gradient(batch, chosen_BS, tokens, parameters)
                for total, slope in zip(gradients, slopes, strict=True):
                    total += slope
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = reduce(gradient, "mean")
        self._optimizer.step()
        self._write_masters()
        self._watch_drift(inputs)
        self._teacher.forget()

    @contextmanager
    def _trainable(self) -> Iterator[list[nn.Parameter]]:
        """While open, the routers alone have gradients; the student is in eval mode."""
        parameters, training = list(self.snapshot.parameters.values()), self._student.training
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._student.eval()
        try:
            with torch.enable_grad():
                yield parameters
        finally:
            self._student.train(training)
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _gradient(
        self, batch: dict[str, Tensor], chosen_BS: Tensor, tokens: int, parameters: list[nn.Parameter]
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Of this micro-batch's part of the loss, and what the teacher's routers were given."""
        given = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask"), "use_cache": False}
        teacher = self._teacher.model
        with torch.no_grad():
            student_TD = body(self._student)(**given).last_hidden_state[chosen_BS]
        with ExitStack() as stack:
            stack.enter_context(rerouted(teacher, _all))
            stack.enter_context(recomputed(teacher) if self._recompute else nullcontext())
            with recorded_activations(teacher, routers=self._sigmoid) as activations:
                teacher_TD = body(teacher)(**given).last_hidden_state[chosen_BS]
            kl = self._divergence(teacher_TD, student_TD) / tokens
            importance = self._importance(activations, batch.get("attention_mask"))
            share = len(student_TD) / tokens
            slopes = torch.autograd.grad(kl + self._config.beta * share * importance, parameters)
        self._add("sar_kl", float(kl.detach()))
        self._add("sar_importance", share * float(importance.detach()))
        return slopes, {layer: hidden_TD.detach() for layer, hidden_TD in activations.expert_inputs.items()}

    def _divergence(self, teacher_TD: Tensor, student_TD: Tensor) -> Tensor:
        """Sum over tokens of KL(teacher || student), differentiable in the teacher; logits in chunks."""
        student_VD = head_weight(self._student, self._vocab).detach()

        def chunk(teacher_tV: Tensor, span: slice) -> dict[str, tuple[float, Tensor]]:
            student_tV = functional.linear(student_TD[span].to(student_VD.dtype), student_VD).detach()
            return {"kl": (1.0, kl_dense(teacher_tV, student_tV).sum())}

        return head_loss(teacher_TD, head_weight(self._teacher.model, self._vocab), chunk)[0]

    def _importance(self, activations: Activations, mask_BS: Tensor | None) -> Tensor:
        """CV(importance)^2 over real tokens, mean over layers."""
        values = []
        for layer, logits_TE in activations.router_logits.items():
            real_TE = logits_TE if mask_BS is None else logits_TE[mask_BS.flatten().bool()]
            values.append(importance_variation(gate_logprobs(real_TE, self._sigmoid[layer]).exp()))
        return torch.stack(values).mean()

    @torch.no_grad()
    def _write_masters(self) -> None:
        for key, parameter in self.snapshot.parameters.items():
            parameter.copy_(self._masters[key])

    @torch.no_grad()
    def _watch_drift(self, inputs: Mapping[int, Tensor]) -> None:
        """On the last micro-batch; the layer that has moved most decides."""
        drift_L = reduce(self.snapshot.drift(inputs), "mean")
        self._seen["sar_drift_nats"] = float(drift_L.max())
        if self._seen["sar_drift_nats"] <= self._config.max_drift_nats:
            return
        layer, limit = list(self._sigmoid)[int(drift_L.argmax())], self._config.max_drift_nats
        message = "the teacher's router in layer %d is %.3g nats from its snapshot (limit %g); all routers are put back"
        log.warning(message, layer, float(drift_L.max()), limit)
        self.snapshot.put_back()
        for key, master in self._masters.items():
            master.copy_(self.snapshot.tensors[key])
        self._optimizer = self._new_optimizer()
        self._add("sar_restored", 1.0)

    def _add(self, name: str, value: float) -> None:
        self._seen[name] = self._seen.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """sar_kl (nats per token), sar_importance, sar_drift_nats (worst layer) of the last router step since the last call,
        and sar_restored, how often the routers were put back meanwhile."""
        seen, self._seen = self._seen, {}
        return seen

    def state(self) -> dict[str, Tensor]:
        """Masters, Adam's moments and step, and the snapshot."""
        tensors = {f"master.{key}": tensor for key, tensor in self._masters.items()}
        tensors |= {f"snapshot.{key}": tensor for key, tensor in self.snapshot.tensors.items()}
        for key, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            tensors |= {f"{name}.{key}": value for name, value in moments.items()}
        return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.snapshot.replace({key: state[f"snapshot.{key}"] for key in self.snapshot.tensors})
        self._optimizer = self._new_optimizer()
        for key, master in self._masters.items():
            master.copy_(state[f"master.{key}"])
            moments = ("step", "exp_avg", "exp_avg_sq")
            found = {name: state[f"{name}.{key}"].clone() for name in moments if f"{name}.{key}" in state}
            if found:
                step = {"step": found.pop("step").cpu()}
                self._optimizer.state[master] = step | {name: value.to(master) for name, value in found.items()}
        self._write_masters()
        self._teacher.forget()


def _all(_layer: int, gate_TE: Tensor, _preference_TE: Tensor) -> Tensor:
    return every_expert(gate_TE)
