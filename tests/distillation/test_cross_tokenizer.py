"""Distillation across tokenizers: refusing it by accident, aligning rows, and a dense student that learns from a mixture.

Shape suffixes: B rows, S tokens, P places where both tokenizations meet, V and W vocabularies.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from moe_edge.contracts.errors import InputRejected
from moe_edge.distillation.cross_tokenizer import CrossTokenizerTerm, compares_tokens, cross_tokenizer_trainer
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.terms import MicroBatch, TeacherActivations
from moe_edge.distillation.tokenizer_pair import TokenizerPair, require_same_tokenizer, tokenizer_differences
from moe_edge.distillation.trainer import DistillationTrainingArguments, RowDataset
from moe_edge.formulas.uld import NextSpan, hybrid_distance, projected_kl
from moe_edge.models.token_bytes import token_bytes
from tests.families.sentencepiece import sentencepiece_tokenizer
from tests.tiny import TEXTS, tiny_model, tiny_tokenizer

HARD = "größer als 42 €, 你好 \U0001f600\n\ttab"


def small() -> PreTrainedTokenizerFast:
    """The student's: fewer merges than the teacher's."""
    return tiny_tokenizer(280)


def dense(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def batch(tokenizer: PreTrainedTokenizerFast, *texts: str) -> MicroBatch:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    valid_BS = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return MicroBatch(ids_BS, valid_BS, TeacherActivations())


def heard(term: CrossTokenizerTerm, student: nn.Module, at: MicroBatch) -> Tensor:
    with term.recording(student):
        student(input_ids=at.ids_BS, attention_mask=at.valid_BS.long())
    return term.loss(at)


def read_until(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    table = token_bytes(tokenizer)
    return b"".join(table[index] for index in ids)


@pytest.mark.parametrize("teacher", [tiny_tokenizer(), sentencepiece_tokenizer()], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", [*TEXTS, HARD])
def test_where_they_meet_both_have_read_the_same(teacher: PreTrainedTokenizerFast, text: str) -> None:
    student = small()
    ids = student(text, add_special_tokens=False)["input_ids"]
    row = TokenizerPair(student, teacher).align(ids)
    assert row is not None and len(row.places_P2) >= 2
    ours = {len(read_until(student, ids[: place + 1])) for place in range(len(ids) - 1)}
    theirs = set()
    for place in range(len(row.teacher_ids) - 1):
        read = read_until(teacher, row.teacher_ids[: place + 1])
        theirs.add(len(read.removeprefix(b" ")) if teacher.bos_token == "<s>" else len(read))
    assert len(row.places_P2) == len(ours & theirs - {0})
    for a, b in row.places_P2.tolist():
        our_text, their_text = read_until(student, ids[: a + 1]), read_until(teacher, row.teacher_ids[: b + 1])
        assert their_text.removeprefix(b" ") == our_text.removeprefix(b" ")


def test_special_tokens_of_one_role_are_one_token() -> None:
    student, teacher = small(), sentencepiece_tokenizer()
    ids = [*student("A few tokens.")["input_ids"], student.eos_token_id, *student("The fox")["input_ids"]]
    row = TokenizerPair(student, teacher).align(ids)
    assert row is not None and row.teacher_ids.count(teacher.eos_token_id) == 1
    place = ids.index(student.eos_token_id)
    met = {a: b for a, b in row.places_P2.tolist()}
    assert place - 1 in met
    space = teacher.convert_tokens_to_ids("\u2581")  # it puts an empty one before every text, and predicts after that
    assert row.teacher_ids[met[place] - 1 : met[place] + 1] == [teacher.eos_token_id, space]
    shared = TokenizerPair(student, teacher).matched(len(teacher), len(student)).tolist()
    assert [teacher.eos_token_id, student.eos_token_id] in shared


def test_a_special_token_that_the_teacher_lacks_is_text() -> None:
    student, teacher = small(), sentencepiece_tokenizer()
    ids = [student.convert_tokens_to_ids("<|im_start|>"), *student("The fox")["input_ids"]]
    row = TokenizerPair(student, teacher).align(ids)
    assert row is not None and read_until(teacher, row.teacher_ids) == b" <|im_start|>The fox"


def test_a_row_may_begin_and_end_within_a_character() -> None:
    student, teacher = small(), tiny_tokenizer()
    whole = student("你 The fox jumps 好", add_special_tokens=False)["input_ids"]
    table = token_bytes(student)
    assert len(table[whole[0]]) < 3 and len(table[whole[-1]]) < 3  # single bytes of a character of three
    ids = whole[1:-1]
    row = TokenizerPair(student, teacher).align(ids)
    assert row is not None and read_until(teacher, row.teacher_ids) == b" The fox jumps "
    skipped = len(read_until(student, ids)) - len(read_until(student, ids).lstrip(bytes(range(0x80, 0xC0))))
    assert skipped == 2 and len(row.places_P2) >= 3
    for a, b in row.places_P2.tolist():
        assert read_until(student, ids[: a + 1])[skipped:] == read_until(teacher, row.teacher_ids[: b + 1])


def test_nothing_after_unreadable_bytes_is_compared() -> None:
    student, teacher = small(), tiny_tokenizer()
    table = token_bytes(student)
    fox = student("The fox jumps", add_special_tokens=False)["input_ids"]
    row = TokenizerPair(student, teacher).align([*fox, table.index(b"\xc3"), *fox])
    assert row is not None and read_until(teacher, row.teacher_ids) == b"The fox jumps"
    assert int(row.places_P2[:, 0].max()) < len(fox)


def test_the_teachers_beginning_is_put_before_a_row() -> None:
    from tokenizers import processors

    teacher = sentencepiece_tokenizer()
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", teacher.bos_token_id)])
    teacher.backend_tokenizer.post_processor = template
    student = small()
    row = TokenizerPair(student, teacher).align(student("The fox jumps")["input_ids"])
    assert row is not None and row.teacher_ids[0] == teacher.bos_token_id and len(row.places_P2) >= 2
    assert row.teacher_ids.count(teacher.bos_token_id) == 1


def test_matched_tokens_are_the_same_bytes() -> None:
    student, teacher = small(), tiny_tokenizer()
    pairs = TokenizerPair(student, teacher).matched(len(teacher), len(student)).tolist()
    ours, theirs = token_bytes(student), token_bytes(teacher)
    assert all(ours[b] == theirs[a] for a, b in pairs)
    assert len(pairs) == len(set(ours) & set(theirs)) == len(student)  # the larger one has all of the smaller one's
    assert TokenizerPair(student, teacher).matched(100, len(student))[:, 0].max() < 100


def test_equal_tokenizers_have_no_differences_and_may_use_any_loss() -> None:
    assert tokenizer_differences(small(), small()) == []
    require_same_tokenizer(small(), small(), ["kl", "cka"])


def test_a_silent_mismatch_is_refused_with_the_differences() -> None:
    with pytest.raises(InputRejected) as caught:
        require_same_tokenizer(small(), sentencepiece_tokenizer(), ["kl", "cka"])
    message = str(caught.value)
    assert (
        caught.value.exit_code == 4
        and "losses cka, kl" in message
        and "use the loss 'projected_kl' or 'uld'" in message
    )
    assert "280 and " in message and "eos_token is '<|im_end|>' and '</s>'" in message
    assert (
        "another normalizer" in message and "tokens with another id, first '<|endoftext|>': id 0 and missing" in message
    )
    require_same_tokenizer(small(), sentencepiece_tokenizer(), [])


def test_the_same_ids_with_other_splitting_are_told_apart() -> None:
    from tokenizers import pre_tokenizers

    other = small()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    assert tokenizer_differences(small(), other) == ["another pre_tokenizer"]


def by_hand(name: str, student: nn.Module, teacher: nn.Module, ids: list[int], pair: TokenizerPair) -> Tensor:
    """The distance at every place of one row, whole logits in float64."""
    widths = len(tiny_tokenizer()), len(small())
    row = pair.align(ids)
    assert row is not None
    with torch.no_grad():
        ours_PW = student(torch.tensor([ids])).logits[0, row.places_P2[:, 0], : widths[1]].double()
        theirs_RV = teacher(torch.tensor([row.teacher_ids])).logits[0, :, : widths[0]].double()
    theirs_PV = theirs_RV[row.places_P2[:, 1]]
    if name == "uld":
        return hybrid_distance(theirs_PV, ours_PW, pair.matched(*widths))
    next_tokens, rests = [], []
    for (a, b), (_, until) in zip(row.places_P2.tolist(), row.next_P2.tolist(), strict=True):
        log_RV = theirs_RV.log_softmax(dim=1)
        rest = [float(log_RV[place - 1, row.teacher_ids[place]]) for place in range(b + 2, until + 1)]
        rests.append(sum(rest) if until >= 0 else -torch.inf)
        next_tokens.append((ids[a + 1], row.teacher_ids[b + 1]))
    ours, theirs = zip(*next_tokens, strict=True)
    span = NextSpan(torch.tensor(ours), torch.tensor(theirs), torch.tensor(rests, dtype=torch.float64))
    return projected_kl(theirs_PV, ours_PW, pair.begins(*widths), span)


@pytest.mark.parametrize("name", ["uld", "projected_kl"])
def test_the_loss_is_the_mean_distance_at_the_places(name: str) -> None:
    student_tokenizer, teacher_tokenizer = small(), tiny_tokenizer()
    student = dense(student_tokenizer)
    teacher = tiny_model("qwen3_moe", vocab=len(teacher_tokenizer) + 4)
    term = CrossTokenizerTerm(student, teacher, student_tokenizer, teacher_tokenizer, name)
    at = batch(student_tokenizer, TEXTS[0], HARD)
    pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
    rows = [ids_S[valid_S].tolist() for ids_S, valid_S in zip(at.ids_BS, at.valid_BS, strict=True)]
    expected = torch.cat([by_hand(name, student, teacher, ids, pair) for ids in rows])
    value = heard(term, student, at)
    assert value.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    read = term.read()
    assert read[f"{name}_places"] == pytest.approx(len(expected) / int(at.valid_BS.sum())) and term.read() == {}
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and not any(m._forward_hooks for m in student.modules())


def test_where_they_meet_again_is_the_next_place() -> None:
    student, teacher = small(), tiny_tokenizer()
    ids = student(TEXTS[0], add_special_tokens=False)["input_ids"]
    row = TokenizerPair(student, teacher).align(ids)
    assert row is not None and row.next_P2[:-1].tolist() == row.places_P2[1:].tolist()
    assert row.next_P2[-1].tolist() == [len(ids) - 1, len(row.teacher_ids) - 1]  # the end, which is no place itself


def test_a_teachers_token_begins_with_a_students() -> None:
    student, teacher = small(), sentencepiece_tokenizer()
    begins = TokenizerPair(student, teacher).begins(len(teacher), len(student)).tolist()
    ours, theirs = token_bytes(student), token_bytes(teacher)
    for index, found in enumerate(begins):
        if index == teacher.eos_token_id:
            assert found == student.eos_token_id
        elif index in teacher.all_special_ids:
            assert found == -1
        else:
            longer = [text for text in ours[3:] if theirs[index].startswith(text) and len(text) > len(ours[found])]
            assert theirs[index].startswith(ours[found]) and not longer


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_dense_student_learns_the_text_from_a_mixture_with_another_tokenizer(kind: str, tmp_path: Path) -> None:
    """The teacher knows the texts, the student only sees the teacher's word: no cross-entropy."""
    student_tokenizer = small()
    teacher_tokenizer = tiny_tokenizer() if kind == "byte-level" else sentencepiece_tokenizer()
    teacher = tiny_model("mixtral", vocab=len(teacher_tokenizer))
    memorise(teacher, teacher_tokenizer)
    student, rows = dense(student_tokenizer).train(), packed(student_tokenizer)
    ids_NS = torch.stack([rows[place]["input_ids"] for place in range(len(rows))])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    untrained = student(ids_NS, labels=ids_NS).loss.item()
    tokenizers = (student_tokenizer, teacher_tokenizer)
    trainer = cross_tokenizer_trainer(student, teacher, tokenizers, arguments(tmp_path, projected_kl=1.0), rows)
    trainer.train()
    assert student(ids_NS, labels=ids_NS).loss.item() < 0.8 * untrained
    log = [entry for entry in trainer.state.log_history if "projected_kl_loss" in entry]
    assert log[-1]["projected_kl_loss"] < 0.8 * log[0]["projected_kl_loss"] and 0.2 < log[0]["projected_kl_places"] < 1
    assert log[0]["total_loss"] == pytest.approx(log[0]["projected_kl_loss"], rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_cross_entropy_and_both_distances_may_be_blended(tmp_path: Path) -> None:
    tokenizers = small(), tiny_tokenizer()
    student, teacher = dense(tokenizers[0]).train(), tiny_model("olmoe", vocab=len(tokenizers[1]))
    settings = arguments(tmp_path, ce=1.0, uld=0.5, projected_kl=0.25)
    settings.distillation_alpha, settings.distillation_temperature = 0.6, 2.0
    trainer = cross_tokenizer_trainer(student, teacher, tokenizers, settings, packed(tokenizers[0]))
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        distances = 0.5 * entry["uld_loss"] + 0.25 * entry["projected_kl_loss"]
        assert entry["total_loss"] == pytest.approx(0.4 * entry["ce_loss"] + 0.6 * 4 * distances, rel=1e-4)


def memorise(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = packed(tokenizer)
    ids_NS = torch.stack([rows[place]["input_ids"] for place in range(len(rows))])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(ids_NS, labels=ids_NS).loss.backward()
        optimizer.step()
    assert model(ids_NS, labels=ids_NS).loss.item() < 1.0


def packed(tokenizer: PreTrainedTokenizerFast, row_tokens: int = 24) -> RowDataset:
    """The texts one after the other, cut into rows, as a build packs its calibration."""
    ids = [index for text in TEXTS * 2 for index in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return RowDataset(np.array(ids[: len(ids) // row_tokens * row_tokens]).reshape(-1, row_tokens))


def arguments(folder: Path, **losses: float) -> DistillationTrainingArguments:
    return DistillationTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=6,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        distillation_alpha=1.0,
        distillation_temperature=1.0,
        loss_weights=losses,
    )


def test_a_loss_that_compares_tokens_is_refused_across_tokenizers(tmp_path: Path) -> None:
    tokenizers = small(), tiny_tokenizer()
    models = dense(tokenizers[0]), tiny_model("mixtral", vocab=len(tokenizers[1]))
    with pytest.raises(InputRejected, match="losses kl"):
        cross_tokenizer_trainer(
            *models, tokenizers, arguments(tmp_path, ce=1.0, uld=1.0, kl=0.5), packed(tokenizers[0])
        )
    assert [name for name in LOSSES if not compares_tokens(name)] == [
        "ce",
        "expert_diversity",
        "load_balance",
        "importance",
        "router_z",
        "uld",
        "projected_kl",
    ]


def test_a_teacher_that_changes_texts_is_refused_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import normalizers

    student_tokenizer, teacher_tokenizer = small(), tiny_tokenizer()
    teacher_tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    student, teacher = dense(student_tokenizer), tiny_model("mixtral", vocab=len(teacher_tokenizer))
    term = CrossTokenizerTerm(student, teacher, student_tokenizer, teacher_tokenizer)
    at = batch(student_tokenizer, *["THE FOX"] * 8)
    with caplog.at_level(logging.WARNING):
        assert heard(term, student, at).item() == 0.0
    assert "changes the text of some rows" in caplog.text
    with pytest.raises(InputRejected, match="of 16 rows it changed 16"):
        heard(term, student, at)
