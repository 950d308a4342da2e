"""What the export is told about the student's own neurons."""

import torch

from moe_edge.compression.importance import FILE, save_importance, student_imatrix


def sums() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "expert_in": torch.rand(2, 4, 6, generator=generator),
        "expert_down": torch.rand(2, 4, 8, generator=generator),
        "expert_count": torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80]]),
        "attention_in": torch.rand(2, 6, generator=generator),
    }


def test_without_a_file_the_teachers_sums_and_choice_stay(tmp_path):
    imatrix, kept = sums(), {1: [0, 2], 3: [1, 3]}
    assert student_imatrix(imatrix, kept, tmp_path) == (imatrix, kept)


def test_measured_columns_replace_the_teachers(tmp_path):
    imatrix, kept = sums(), {1: [0, 2], 3: [1, 3]}  # decoder layers 1 and 3 are the MoE layers
    energy = {3: torch.full((2, 5), 2.0), 1: torch.full((2, 5), 1.0)}
    save_importance(tmp_path, energy)
    student, rest = student_imatrix(imatrix, kept, tmp_path)
    assert rest is None
    assert student["expert_count"].tolist() == [[10, 30], [60, 80]]
    assert torch.equal(student["expert_in"][1], imatrix["expert_in"][1][[1, 3]])
    assert student["expert_down"][:, :, 0].tolist() == [[10.0, 30.0], [120.0, 160.0]]  # mean square x count
    assert torch.equal(student["attention_in"], imatrix["attention_in"])
    save_importance(tmp_path, {})
    assert not (tmp_path / FILE).exists()


def test_all_experts_may_be_kept(tmp_path):
    save_importance(tmp_path, {0: torch.ones(4, 5), 1: torch.ones(4, 5)})
    student, rest = student_imatrix(sums(), None, tmp_path)
    assert rest is None and student["expert_down"].shape == (2, 4, 5)
    assert student["expert_down"][1, :, 0].tolist() == [50.0, 60.0, 70.0, 80.0]
