"""Router terms on tiny students: values by hand, padding, refusals, and what they do when trained on.

Legend: T tokens, E experts, K top-k.
"""

import pytest
import torch
from torch import Tensor, nn

from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.distillation.router_terms import ROUTER_TERMS
from moe_edge.distillation.terms import MicroBatch, TeacherActivations, Term, TermContext, TermInputs
from moe_edge.formulas.routers import gate_logprobs, importance_variation, load_balance, router_z
from moe_edge.models.pruning import prune
from moe_edge.models.routing import router_parameters
from moe_edge.models.taps import recorded_activations
from moe_edge.models.views import moe_layers
from tests.distillation.parts import KEPT, VOCAB, tiny_student, tiny_teacher
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model

IDS = tiny_ids(tokens=16, rows=3, vocab=VOCAB)
STAGE = StageConfig(stage_name="s")


def built(
    name: str, student: nn.Module, teacher: nn.Module | None = None, kept: dict[int, list[int]] | None = None
) -> Term:
    return ROUTER_TERMS[name](TermContext(student, teacher, STAGE, TermInputs(kept)))


def batch(teacher: nn.Module | None = None, valid_BS: Tensor | None = None, layers: tuple[int, ...] = ()) -> MicroBatch:
    teacher_activations = TeacherActivations()
    if teacher is not None:
        with torch.no_grad(), recorded_activations(teacher, routers=layers) as activations:
            teacher(IDS)
        teacher_activations = TeacherActivations(router_logits=activations.router_logits)
    return MicroBatch(
        IDS, torch.ones_like(IDS, dtype=torch.bool) if valid_BS is None else valid_BS, teacher_activations
    )


def judged(term: Term, student: nn.Module, at: MicroBatch) -> Tensor:
    with term.recording(student):
        student(IDS)
    return term.loss(at)


def student_logits(student: nn.Module) -> dict[int, Tensor]:
    layers = [view.index for view in moe_layers(student)]
    with torch.no_grad(), recorded_activations(student, routers=layers) as activations:
        student(IDS)
    return activations.router_logits


@pytest.mark.parametrize("name", ["load_balance", "importance", "router_z"])
def test_a_term_is_the_mean_of_its_formula_over_layers_and_real_tokens(name: str) -> None:
    student = tiny_student("olmoe")
    valid_BS = torch.ones_like(IDS, dtype=torch.bool)
    valid_BS[1, 5:] = False
    expected = []
    for logits_TE in student_logits(student).values():
        real_TE = logits_TE[valid_BS.flatten()]
        gate_TE = real_TE.softmax(dim=1)
        values = {
            "load_balance": load_balance(gate_TE, gate_TE.topk(2).indices),
            "importance": importance_variation(gate_TE),
            "router_z": router_z(real_TE),
        }
        expected.append(values[name])
    value = judged(built(name, student), student, batch(valid_BS=valid_BS))
    torch.testing.assert_close(value, torch.stack(expected).mean())
    everything = judged(built(name, student), student, batch())
    assert abs(float((value - everything).detach())) > 1e-5


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("name", ["load_balance", "importance", "router_z", "routing_kl"])
def test_every_family_gives_finite_values_and_gradients_for_its_routers(family: str, name: str) -> None:
    teacher, student = tiny_model(family, layers=3), tiny_model(family, layers=3, seed=1)
    layers = tuple(view.index for view in moe_layers(student))
    term = built(name, student, teacher=teacher)
    loss = judged(term, student, batch(teacher, layers=layers))
    slopes = torch.autograd.grad(loss, list(router_parameters(student).values()), allow_unused=True)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(slope is not None and torch.isfinite(slope).all() and slope.abs().max() > 0 for slope in slopes)


def test_routing_kl_is_zero_in_the_first_layer_of_a_pruned_student() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    term = built("routing_kl", student, teacher=teacher, kept=KEPT)
    assert term.needs.routers == frozenset(range(3)) and not term.needs.layers
    at = batch(teacher, layers=(0, 1, 2))
    whole = judged(term, student, at)
    by_hand = []
    for layer, student_TE in student_logits(student).items():
        p = at.teacher.router_logits[layer][:, KEPT[layer]].double().softmax(dim=1)
        q = student_TE.double().softmax(dim=1)
        by_hand.append(float((p * (p / q).log()).sum(dim=1).mean()))
    assert by_hand[0] == pytest.approx(0, abs=1e-6) and min(by_hand[1:]) > 1e-4
    assert whole.item() == pytest.approx(sum(by_hand) / 3, rel=1e-4)


def test_training_on_routing_kl_brings_the_gates_together() -> None:
    teacher, student = tiny_model("qwen3_moe", vocab=VOCAB), tiny_model("qwen3_moe", vocab=VOCAB, seed=3)
    term = built("routing_kl", student, teacher=teacher)
    at = batch(teacher, layers=(0, 1))
    optimizer = torch.optim.Adam(router_parameters(student).values(), lr=0.02)
    values = []
    for _ in range(30):
        loss = judged(term, student, at)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_training_on_balance_spreads_the_load() -> None:
    student = tiny_model("mixtral", vocab=VOCAB, experts=6)
    terms = [built("load_balance", student), built("importance", student)]
    optimizer = torch.optim.Adam(router_parameters(student).values(), lr=0.02)
    first = [judged(term, student, batch()).item() for term in terms]
    for _ in range(20):
        loss = sum(judged(term, student, batch()) for term in terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(judged(term, student, batch()).item() < start for term, start in zip(terms, first, strict=True))


def test_a_student_without_its_teachers_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 0 has 3 experts, the plan kept 2"):
        built("routing_kl", tiny_student(), kept={layer: [0, 1] for layer in range(3)})
    smaller = tiny_teacher()
    prune(smaller, {layer: [0, 1] for layer in range(3)}, 1)
    with pytest.raises(ConfigError, match="of the teacher has no expert 3"):
        built("routing_kl", tiny_student(), teacher=smaller, kept=KEPT)


@pytest.mark.parametrize("name", list(ROUTER_TERMS))
def test_a_dense_student_has_no_routers_to_train(name: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    with pytest.raises(ConfigError, match=f"the loss '{name}' needs a student with routers"):
        built(name, Qwen3ForCausalLM(config))


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2"])
def test_probabilities_under_the_name_of_logits_are_noticed(family: str) -> None:
    student = tiny_model(family, vocab=VOCAB)
    term = built("router_z", student)
    sigmoid = moe_layers(student)[0].family.gating == "sigmoid"

    def spoil(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (output[0].sigmoid() if sigmoid else gate_logprobs(output[0]).exp(), *output[1:])

    for view in moe_layers(student):
        view.router.register_forward_hook(spoil)
    with pytest.raises(EnvironmentProblem, match="probabilities where logits are expected"):
        judged(term, student, batch())


def test_terms_leave_nothing_behind() -> None:
    student = tiny_student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name in ROUTER_TERMS:
        judged(built(name, student, kept=KEPT), student, batch(tiny_teacher(), layers=(0, 1, 2)))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
