"""The loss 'uld': a student learns from a teacher with another tokenizer, for example a dense one from a mixture.

Every row of the student's ids is put into the teacher's tokens, the teacher reads it, and wherever both tokenizations end
a token at the same byte the two next-token distributions are compared (formulas/uld.py). Logits of both sides are made
in chunks and never held whole.

Shape suffixes: B rows, S student tokens of a row, R teacher tokens, P places where both meet, t places of a chunk,
D model, V teacher vocabulary, W student vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_edge.contracts.errors import InputRejected
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.terms import Needs, Scene
from moe_edge.distillation.tokenizer_pair import AlignedRow, TokenizerPair, require_same_tokenizer
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts
from moe_edge.families.taps import body, head
from moe_edge.formulas.head_loss import head_loss
from moe_edge.formulas.uld import hybrid_distance

log = logging.getLogger(__name__)
PATIENCE_ROWS = 16  # after as many, half of them must have been readable to the teacher


class CrossTokenizerTerm:
    """A Term that runs its own teacher, because the trainer's rows are not in the teacher's tokens; also an Observer.

    Args:
        student, teacher: whole models; the teacher is frozen here.
        student_tokenizer, teacher_tokenizer: theirs; fast ones.
        temperature: of both distributions.

    Raises:
        InputRejected: a tokenizer whose tokens are not bytes, or no token is shared.
    """

    name = "uld"
    sampled = False
    needs = Needs()

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
    ) -> None:
        self._student, self._teacher = student, teacher.requires_grad_(False).eval()
        self._pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
        self._widths = [
            min(len(tokenizer), head(model).weight.shape[0])
            for model, tokenizer in ((teacher, teacher_tokenizer), (student, student_tokenizer))
        ]
        self._matched_M2 = self._pair.matched(*self._widths)
        if not len(self._matched_M2):
            raise InputRejected("the two tokenizers share no token", where="uld", why="not even single bytes")
        self._temperature = temperature
        self._hidden_BSD: Tensor | None = None
        self._rows, self._unreadable = 0, 0
        self._places, self._tokens = 0, 0

    @contextmanager
    def listening(self, student: nn.Module) -> Iterator[None]:
        def hear(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            self._hidden_BSD = output.last_hidden_state

        handle = body(student).register_forward_hook(hear)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, scene: Scene) -> Tensor:
        """Mean over the places where both tokenizations meet; zero where there is none.

        Raises:
            InputRejected: the teacher's tokenizer changes most of the texts.
        """
        assert self._hidden_BSD is not None
        rows = [ids_S[valid_S].tolist() for ids_S, valid_S in zip(scene.ids_BS, scene.valid_BS, strict=True)]
        aligned = [self._pair.align(row) for row in rows]
        self._count(rows, aligned)
        found = [(place, row) for place, row in enumerate(aligned) if row is not None and len(row.places_P2)]
        if not found:
            return self._hidden_BSD.sum() * 0.0
        theirs = self._teacher_hidden([row.teacher_ids for _, row in found], scene.ids_BS.device)
        student_PD = torch.cat([self._hidden_BSD[place, row.places_P2[:, 0]] for place, row in found])
        teacher_PD = torch.cat([theirs[line, row.places_P2[:, 1]] for line, (_, row) in enumerate(found)])
        return self._distance(student_PD, teacher_PD) / len(student_PD)

    @torch.no_grad()
    def _teacher_hidden(self, rows: Sequence[list[int]], device: torch.device) -> Tensor:
        """The teacher's final hidden states of rows of different lengths, padded at their ends."""
        longest = max(len(row) for row in rows)
        ids_BR = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask_BR = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        output = body(self._teacher)(input_ids=ids_BR, attention_mask=mask_BR, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _distance(self, student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
        """Summed over places; logits of a chunk at a time."""
        teacher_VD = head(self._teacher).weight[: self._widths[0]]
        student_WD = head(self._student).weight[: self._widths[1]]
        matched_M2 = self._matched_M2.to(student_PD.device)

        def chunk(student_tW: Tensor, span: slice) -> dict[str, tuple[float, Tensor]]:
            with torch.no_grad():
                teacher_tV = functional.linear(teacher_PD[span].to(teacher_VD.dtype), teacher_VD)
            distance_t = hybrid_distance(teacher_tV, student_tW, matched_M2, self._temperature)
            return {self.name: (1.0, distance_t.sum())}

        return head_loss(student_PD, student_WD, chunk)[0]

    def _count(self, rows: Sequence[list[int]], aligned: Sequence[AlignedRow | None]) -> None:
        lost = sum(row is None for row in aligned)
        if lost and not self._unreadable:
            log.warning("the teacher's tokenizer changes the text of some rows; the loss 'uld' leaves them out")
        self._rows, self._unreadable = self._rows + len(rows), self._unreadable + lost
        self._tokens += sum(len(row) for row in rows)
        self._places += sum(len(row.places_P2) for row in aligned if row is not None)
        if self._rows >= PATIENCE_ROWS and 2 * self._unreadable > self._rows:
            why = f"of {self._rows} rows it changed {self._unreadable}; its tokens must add up to the text"
            raise InputRejected("the teacher's tokenizer cannot be aligned with the student's", where="uld", why=why)

    def read(self) -> dict[str, float]:
        """uld_places: share of the student's tokens after which both tokenizations meet."""
        places, tokens = self._places, self._tokens
        self._places = self._tokens = 0
        return {"uld_places": places / tokens} if tokens else {}


def compares_tokens(loss: str) -> bool:
    """Does a loss hold teacher and student against each other token by token, so that both need the same tokens?"""
    row = LOSSES[loss]
    return loss != CrossTokenizerTerm.name and (row.kind == "divergence" or row.teacher)


def cross_tokenizer_trainer(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    args: DistillationTrainingArguments,
    rows: Dataset[dict[str, Tensor]],
    **options: Any,
) -> DistillationTrainer:
    """A trainer of any causal student, dense or not, on a teacher with another tokenizer.

    Args:
        tokenizers: the student's, the teacher's.
        args: `loss_weights` such as {"ce": 1.0, "uld": 1.0}; alpha weighs the first, 1 trains on the teacher alone.
        rows: in the student's tokens, as `RowDataset` yields them.
        options: further arguments of `DistillationTrainer`.

    Raises:
        InputRejected: see `CrossTokenizerTerm`; or a loss is asked for that compares token by token.
        ConfigError: as `DistillationTrainer`.
    """
    require_same_tokenizer(*tokenizers, [name for name in args.loss_weights if compares_tokens(name)])
    term = CrossTokenizerTerm(student, teacher, *tokenizers, args.distillation_temperature)
    parts = Parts(terms=[term], observers=[term])
    return DistillationTrainer(student, args, rows, parts=parts, vocab=len(tokenizers[0]), **options)
