"""The losses 'uld' and 'projected_kl': a student learns from a teacher with another tokenizer, for example a dense one
from a mixture.

Every row of the student's ids is put into the teacher's tokens, the teacher reads it, and wherever both tokenizations end
a token at the same byte the two next-token distributions are compared (formulas/uld.py). Logits of both sides are made
in chunks and never held whole. 'projected_kl' is the better one; 'uld' is the method of the literature, and wants the
cross-entropy beside it.

Shape suffixes: B rows, S student tokens of a row, R teacher tokens, T = B x R, P places where both meet, t of them in
a chunk, D model, V teacher vocabulary, W student vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.teacher import head_weight
from moe_edge.distillation.terms import MicroBatch, Needs, TeacherActivations, Term, TermContext
from moe_edge.distillation.tokenizer_pair import AlignedRow, TokenizerPair, require_same_tokenizer
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts
from moe_edge.formulas.divergence import CHUNK_TOKENS, cross_entropy
from moe_edge.formulas.head_loss import head_loss
from moe_edge.formulas.uld import NextSpan, hybrid_distance, projected_kl
from moe_edge.models.loading import true_vocabulary
from moe_edge.models.taps import body
from moe_edge.process.progress import track

log = logging.getLogger(__name__)
ACROSS: tuple[Literal["uld", "projected_kl"], ...] = ("uld", "projected_kl")
PATIENCE_ROWS = 16  # after as many, half of them must have been readable to the teacher


class CrossTokenizerTerm:
    """A Term that runs its own teacher, because the trainer's rows are not in the teacher's tokens; also an Observer.

    Args:
        student, teacher: whole models; the teacher is frozen here.
        student_tokenizer, teacher_tokenizer: theirs; fast ones.
        name: which loss.
        temperature: of both distributions.

    Raises:
        InputRejected: a tokenizer whose tokens are not bytes, or no token is shared.
    """

    sampled = False
    needs = Needs(whole=True)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        name: Literal["uld", "projected_kl"] = "projected_kl",
        temperature: float = 1.0,
    ) -> None:
        self.name: str = name
        self._temperature = temperature
        self._student, self._teacher = student, teacher.requires_grad_(False).eval()
        self._pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
        self._widths = [
            true_vocabulary(tokenizer, len(head_weight(model)))
            for model, tokenizer in ((teacher, teacher_tokenizer), (student, student_tokenizer))
        ]
        matched_M2, device = self._pair.matched(*self._widths), next(student.parameters()).device
        if not len(matched_M2):
            raise InputRejected("the two tokenizers share no token", where=name, why="not even single bytes")
        self._tokens_map = matched_M2.to(device) if name == "uld" else self._pair.begins(*self._widths).to(device)
        self._hidden_BSD: Tensor | None = None
        self._rows, self._unreadable = 0, 0
        self._places, self._tokens = 0, 0

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            self._hidden_BSD = output.last_hidden_state

        handle = body(student).register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean over the places where both tokenizations meet; zero where there is none.

        Raises:
            InputRejected: the teacher's tokenizer changes most of the texts.
        """
        assert self._hidden_BSD is not None
        rows = [ids_S[valid_S].tolist() for ids_S, valid_S in zip(batch.ids_BS, batch.valid_BS, strict=True)]
        aligned = [self._pair.align(row) for row in rows]
        self._count(rows, aligned)
        found = [(place, row) for place, row in enumerate(aligned) if row is not None and len(row.places_P2)]
        if not found:
            return self._hidden_BSD.sum() * 0.0
        theirs_BRD = self._teacher_hidden([row.teacher_ids for _, row in found], batch.ids_BS.device)
        student_PD = torch.cat([self._hidden_BSD[place, row.places_P2[:, 0]] for place, row in found])
        teacher_PD = torch.cat([theirs_BRD[line, row.places_P2[:, 1]] for line, (_, row) in enumerate(found)])
        span = self._next_span([(rows[place], row) for place, row in found], theirs_BRD)
        return self._distance(student_PD, teacher_PD, span) / len(student_PD)

    @torch.no_grad()
    def _teacher_hidden(self, rows: Sequence[list[int]], device: torch.device) -> Tensor:
        """The teacher's final hidden states of rows of different lengths, padded at their ends: [B, R, D]."""
        longest = max(len(row) for row in rows)
        ids_BR = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask_BR = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        output = body(self._teacher)(input_ids=ids_BR, attention_mask=mask_BR, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _next_span(self, found: Sequence[tuple[list[int], AlignedRow]], theirs_BRD: Tensor) -> NextSpan | None:
        """What follows every place, for 'projected_kl'."""
        if self.name == "uld":
            return None
        device, columns = theirs_BRD.device, []
        for line, (ids, row) in enumerate(found):
            ids_R = torch.tensor(row.teacher_ids, device=device)
            place_P2, next_P2 = row.places_P2.to(device), row.next_P2.to(device)
            until_R = self._log_likelihood(theirs_BRD[line, : len(ids_R) - 1], ids_R[1:])
            rest_P = until_R[next_P2[:, 1].clamp_min(0)] - until_R[place_P2[:, 1] + 1]
            rest_P = rest_P.masked_fill(next_P2[:, 1] < 0, -torch.inf)
            ids_S = torch.tensor(ids, device=device)
            columns.append((ids_S[place_P2[:, 0] + 1], ids_R[place_P2[:, 1] + 1], rest_P))
        return NextSpan(*(torch.cat(column) for column in zip(*columns, strict=True)))

    @torch.no_grad()
    def _log_likelihood(self, hidden_RD: Tensor, labels_R: Tensor) -> Tensor:
        """Sum of the teacher's log-probabilities of the tokens from the second to each one, float64 [R + 1]."""
        weight_VD, parts = self._teacher_head(), [torch.zeros(1, dtype=torch.float64, device=hidden_RD.device)]
        for start in range(0, len(labels_R), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits_tV = functional.linear(hidden_RD[part].to(weight_VD.dtype), weight_VD)
            parts.append(-cross_entropy(logits_tV, labels_R[part]).double())
        return torch.cat(parts).cumsum(0)

    def _teacher_head(self) -> Tensor:
        return head_weight(self._teacher, self._widths[0])

    def _distance(self, student_PD: Tensor, teacher_PD: Tensor, span: NextSpan | None) -> Tensor:
        """Summed over places; logits of a chunk at a time."""
        teacher_VD, student_WD = self._teacher_head(), head_weight(self._student, self._widths[1])

        def chunk(student_tW: Tensor, part: slice) -> dict[str, tuple[float, Tensor]]:
            with torch.no_grad():
                teacher_tV = functional.linear(teacher_PD[part].to(teacher_VD.dtype), teacher_VD)
            sides = (teacher_tV, student_tW, self._tokens_map)
            if span is None:
                distance_t = hybrid_distance(*sides, self._temperature)
            else:
                distance_t = projected_kl(*sides, span[part], self._temperature)
            return {self.name: (1.0, distance_t.sum())}

        return head_loss(student_PD, student_WD, chunk)[0]

    def _count(self, rows: Sequence[list[int]], aligned: Sequence[AlignedRow | None]) -> None:
        lost = sum(row is None for row in aligned)
        if lost and not self._unreadable:
            log.warning("the teacher's tokenizer changes the text of some rows; they are left out")
        self._rows, self._unreadable = self._rows + len(rows), self._unreadable + lost
        self._tokens += sum(len(row) for row in rows)
        self._places += sum(len(row.places_P2) for row in aligned if row is not None)
        if self._rows >= PATIENCE_ROWS and 2 * self._unreadable > self._rows:
            why = f"of {self._rows} rows it changed {self._unreadable}; its tokens must add up to the text"
            raise InputRejected(
                "the teacher's tokenizer cannot be aligned with the student's", where=self.name, why=why
            )

    def read(self) -> dict[str, float]:
        """<name>_places: share of the student's tokens after which both tokenizations meet."""
        places, tokens = self._places, self._tokens
        self._places = self._tokens = 0
        return {f"{self.name}_places": places / tokens} if tokens else {}


def _term(name: Literal["uld", "projected_kl"], context: TermContext) -> Term:
    """The term of a stage; raises ConfigError where the stage knows no tokenizers."""
    if context.inputs.tokenizers is None or context.teacher is None:
        why = "the texts of both sides must be known, and the teacher in memory"
        raise ConfigError(f"the loss '{name}' needs both tokenizers", where="distill.stages: losses", why=why)
    return CrossTokenizerTerm(context.student, context.teacher, *context.inputs.tokenizers, name, context.temperature)


CROSS_TOKENIZER_TERMS: dict[str, Callable[[TermContext], Term]] = {name: partial(_term, name) for name in ACROSS}


@torch.no_grad()
def held_out_distance(term: CrossTokenizerTerm, student: nn.Module, ids_NS: Tensor) -> float:
    """What the term says of rows of the student's ids, a mean over them."""
    total = 0.0
    for ids_S in track(ids_NS, f"distill: held-out {term.name}"):
        ids_1S = ids_S.long()[None].to(next(student.parameters()).device)
        with term.recording(student):
            body(student)(input_ids=ids_1S, use_cache=False)
        total += float(term.loss(MicroBatch(ids_1S, torch.ones_like(ids_1S, dtype=torch.bool), TeacherActivations())))
    return total / len(ids_NS)


def compares_tokens(loss: str) -> bool:
    """Does a loss hold teacher and student against each other token by token, so that both need the same tokens?"""
    row = LOSSES[loss]
    return loss not in ACROSS and (row.kind == "divergence" or row.teacher)


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
        args: `loss_weights` such as {"ce": 1.0, "projected_kl": 1.0}; alpha 1 trains on the teacher alone.
        rows: in the student's tokens, as `RowDataset` yields them.
        options: further arguments of `DistillationTrainer`.

    Raises:
        InputRejected: see `CrossTokenizerTerm`; or a loss is asked for that compares token by token.
        ConfigError: as `DistillationTrainer`.
    """
    require_same_tokenizer(*tokenizers, [name for name in args.loss_weights if compares_tokens(name)])
    names = [name for name in ACROSS if args.loss_weights.get(name)]
    terms = [CrossTokenizerTerm(student, teacher, *tokenizers, name, args.distillation_temperature) for name in names]
    parts = Parts(terms=terms, observers=terms)
    return DistillationTrainer(student, args, rows, parts=parts, vocab=len(tokenizers[0]), **options)
