"""Where two tokenizations meet, and the distance of two next-token distributions over different vocabularies."""

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.uld import (
    NextSpan,
    hybrid_distance,
    matched_kl,
    projected_kl,
    shared_boundaries,
    sorted_distance,
)

T = 7


def ends(*pieces: str) -> Tensor:
    return torch.tensor([len(piece.encode()) for piece in pieces]).cumsum(0)


def logits(width: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(T, width, generator=torch.manual_seed(seed), dtype=torch.float64)


def pairs(*found: tuple[int, int]) -> Tensor:
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def test_boundaries_of_two_tokenizations() -> None:
    one, other = ends("The", " qu", "ick", " fox", "es"), ends("T", "he", " quick", " ", "fox", "es")
    assert shared_boundaries(one, other).tolist() == [[0, 1], [2, 2], [3, 4], [4, 5]]
    assert shared_boundaries(other, one).tolist() == [[1, 0], [2, 2], [4, 3], [5, 4]]


def test_characters_of_several_bytes_may_be_split() -> None:
    euro = "€".encode()
    one = torch.tensor([len(euro[:1]), len(euro[1:]), 1]).cumsum(0)  # within the character
    other = torch.tensor([len(euro[:2]), len(euro[2:]), 1]).cumsum(0)
    assert shared_boundaries(one, other).tolist() == [[1, 1], [2, 2]]
    assert shared_boundaries(ends("größ", "er"), ends("gr", "ö", "ßer")).tolist() == [[1, 2]]


def test_empty_tokens_belong_to_what_was_read_before_them() -> None:
    one, other = torch.tensor([2, 2, 5]), torch.tensor([0, 2, 5, 5])
    assert shared_boundaries(one, other).tolist() == [[1, 1], [2, 3]]
    nothing = torch.zeros(0, dtype=torch.long)
    assert shared_boundaries(one, nothing).shape == shared_boundaries(nothing, one).shape == (0, 2)


def test_boundaries_against_sets() -> None:
    generator = torch.manual_seed(0)
    for _ in range(50):
        one, other = (torch.randint(0, 4, (12,), generator=generator).cumsum(0) for _ in range(2))
        last = [{int(end): place for place, end in enumerate(side)} for side in (one, other)]
        expected = [[last[0][end], last[1][end]] for end in sorted(set(last[0]) & set(last[1]))]
        assert shared_boundaries(one, other).tolist() == expected


def test_sorted_distance_by_hand() -> None:
    one, other = torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([[0.2, 0.8]])
    assert sorted_distance(one, other).item() == pytest.approx(abs(0.6 - 0.8) + abs(0.3 - 0.2) + 0.1)
    assert sorted_distance(one, one.flip(1)).item() == 0


def test_equal_vocabularies_give_the_plain_kl() -> None:
    everything = torch.arange(9).repeat(2, 1).T
    p, q = logits(9).log_softmax(1), logits(9, 1).log_softmax(1)
    expected_T = (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(hybrid_distance(logits(9), logits(9, 1), everything), expected_T)


def test_disjoint_vocabularies_give_plain_uld() -> None:
    p, q = logits(9).softmax(1), logits(6, 1).softmax(1)
    expected_T = []
    for p_V, q_W in zip(p, q, strict=True):
        a, b = sorted(p_V.tolist(), reverse=True), sorted(q_W.tolist(), reverse=True) + [0.0] * 3
        expected_T.append(sum(abs(x - y) for x, y in zip(a, b, strict=True)))
    value_T = hybrid_distance(logits(9), logits(6, 1), pairs())
    torch.testing.assert_close(value_T, torch.tensor(expected_T, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixed_case_against_a_loop(temperature: float) -> None:
    matched = pairs((0, 2), (4, 0), (5, 5))
    value_T = hybrid_distance(logits(8), logits(6, 1), matched, temperature)
    for row in range(T):
        p = (logits(8)[row] / temperature).softmax(0).tolist()
        q = (logits(6, 1)[row] / temperature).softmax(0).tolist()
        rest_p = sorted((x for i, x in enumerate(p) if i not in (0, 4, 5)), reverse=True)
        rest_q = sorted((x for i, x in enumerate(q) if i not in (2, 0, 5)), reverse=True) + [0.0, 0.0]
        outcomes = [(p[0], q[2]), (p[4], q[0]), (p[5], q[5]), (sum(rest_p), sum(rest_q))]
        kl = sum(a * float(torch.tensor(a / b, dtype=torch.float64).log()) for a, b in outcomes)
        distance = sum(abs(a - b) for a, b in zip(rest_p, rest_q, strict=True))
        assert value_T[row].item() == pytest.approx(kl + distance, rel=1e-9)


def test_a_student_whose_tokens_all_match_learns_the_conditional_distribution() -> None:
    matched = pairs((1, 0), (2, 1), (4, 2))
    conditional = logits(6)[:, [1, 2, 4]]
    torch.testing.assert_close(
        matched_kl(logits(6).log_softmax(1), conditional.log_softmax(1), matched),
        torch.zeros(T, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )
    assert (matched_kl(logits(6).log_softmax(1), logits(3, 1).log_softmax(1), matched) > 0).all()


def test_a_teacher_whose_tokens_all_match_leaves_a_finite_loss() -> None:
    matched = pairs((0, 1), (1, 3), (2, 4))
    value_T = hybrid_distance(logits(3), logits(6, 1), matched)
    assert torch.isfinite(value_T).all() and (value_T > 0).all()


def test_never_negative_zero_at_a_match_and_the_gradient_is_that_of_the_value() -> None:
    matched = pairs((0, 2), (4, 0), (5, 5))
    student_TW = logits(6, 1).requires_grad_(True)
    assert (hybrid_distance(logits(8), student_TW, matched) >= 0).all()
    assert torch.autograd.gradcheck(lambda z: hybrid_distance(logits(8), z, matched), student_TW)
    same = hybrid_distance(logits(8), logits(8)[:, [4, 1, 0, 3, 2, 5, 6, 7]], pairs((4, 0), (0, 2), (5, 5)))
    torch.testing.assert_close(same, torch.zeros(T, dtype=torch.float64), atol=1e-12, rtol=0)
    assert hybrid_distance(logits(8).bfloat16(), logits(6).bfloat16(), matched).dtype == torch.float32


def span(student: list[int], teacher: list[int], rest: list[float]) -> NextSpan:
    return NextSpan(torch.tensor(student), torch.tensor(teacher), torch.tensor(rest, dtype=torch.float64))


BEGINS = torch.tensor([0, 1, 1, 3, 3, -1, 4])  # teacher's 7 tokens, student's 6; token 2 of the student begins none
SPAN = span([1, 2, 3, 2, 0, 5, 4], [2, 1, 3, 1, 0, 3, 5], [0.0, -0.7, 0.0, -torch.inf, 0.0, -1.2, 0.0])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_projected_kl_against_a_loop(temperature: float) -> None:
    value_T = projected_kl(logits(7), logits(6, 1), BEGINS, SPAN, temperature)
    for row in range(T):
        p = (logits(7)[row] / temperature).softmax(0).tolist()
        target = [0.0] * 6
        for token, begins in enumerate(BEGINS.tolist()):
            if begins >= 0:
                target[begins] += p[token]
        ours, theirs = int(SPAN.student_T[row]), int(SPAN.teacher_T[row])
        if BEGINS[theirs] >= 0:
            moved = p[theirs] * float(SPAN.rest_T[row].exp())
            target[int(BEGINS[theirs])] -= moved
            target[ours] += moved
        total = sum(target)
        q_W = (logits(6, 1)[row] / temperature).log_softmax(0)
        expected = sum(
            a / total * float(torch.tensor(a / total).log() - b) for a, b in zip(target, q_W, strict=True) if a
        )
        assert value_T[row].item() == pytest.approx(expected, rel=1e-5)


def test_projected_kl_with_equal_vocabularies_is_the_plain_kl() -> None:
    tokens = [3, 1, 0, 2, 5, 4, 3]
    p, q = logits(6).log_softmax(1), logits(6, 1).log_softmax(1)
    value_T = projected_kl(logits(6), logits(6, 1), torch.arange(6), span(tokens, tokens, [0.0] * T))
    torch.testing.assert_close(value_T, (p.exp() * (p - q)).sum(1))


def test_a_students_longer_token_has_the_chance_of_the_teachers_pieces() -> None:
    """Teacher: a, b. Student: a, b, ab. The text goes on with ab, to which the teacher gives 0.6 x 0.3."""
    teacher_TV = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    target_TW = torch.tensor([[0.6 - 0.18, 0.4, 0.18]], dtype=torch.float64)
    after = span([2], [0], [float(torch.tensor(0.3, dtype=torch.float64).log())])
    value_T = projected_kl(teacher_TV, target_TW.log(), torch.tensor([0, 1]), after)
    assert value_T.item() == pytest.approx(0, abs=1e-12)


def test_projected_kl_is_never_negative_and_has_the_gradient_of_its_value() -> None:
    student_TW = logits(6, 1).requires_grad_(True)
    assert (projected_kl(logits(7), student_TW, BEGINS, SPAN) >= 0).all()
    assert torch.autograd.gradcheck(lambda z: projected_kl(logits(7), z, BEGINS, SPAN), student_TW)
