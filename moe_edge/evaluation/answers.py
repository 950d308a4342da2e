"""Answers to instruction rows: generated in batches, kept row by row, never generated twice.

`answers.jsonl` grows by one line per finished answer, keyed by what the answer depends on: the row's prompt, the run's seed,
the artifact's content and the protocol. A killed run goes on behind its last whole line. A row whose runtime failed is
written down too, but tried again next time, because failures are never cached.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.evaluation import ProtocolFacts
from moe_edge.contracts.manifest import canonical_sha256
from moe_edge.metrics.text_answers import Answer, Status, failed, judge_answer
from moe_edge.process.progress import track
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Prompt, Runtime
from moe_edge.runtimes.sampling import Sampling
from moe_edge.runtimes.text_codec import TextCodec, open_codec
from moe_edge.texts.instruction_rows import PROMPT_TOKENS, SEEDS, TOTAL_TOKENS, InstructionRow

log = logging.getLogger(__name__)

ANSWERS_SCHEMA = "moe-edge/answers@2"
ANSWERS_NAME = "answers.jsonl"
GREEDY_RUN = "greedy"


@dataclass(frozen=True)
class Protocol:
    """How answers are generated; the defaults are MiniLLM's contract.

    A prompt longer than `prompt_tokens` keeps its first ones, as MiniLLM's does.
    """

    sampling: Sampling = field(default_factory=Sampling)
    seeds: tuple[int, ...] = SEEDS
    prompt_tokens: int = PROMPT_TOKENS
    max_new_tokens: int = TOTAL_TOKENS - PROMPT_TOKENS

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_new_tokens < 1:
            raise ConfigError("a prompt and an answer need at least one token each")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must be given and differ: {list(self.seeds)}")

    @property
    def runs(self) -> dict[str, int]:
        """Run name -> seed; a greedy answer needs no seed, and there is one run of it."""
        return {GREEDY_RUN: 0} if self.sampling.greedy else {str(seed): seed for seed in self.seeds}

    @property
    def digest(self) -> str:
        """Of everything but the seeds: what a single answer depends on."""
        return canonical_sha256([ANSWERS_SCHEMA, asdict(self.sampling), self.prompt_tokens, self.max_new_tokens])

    def facts(self) -> ProtocolFacts:
        """As it is reported."""
        return ProtocolFacts(
            runs=list(self.runs),
            **asdict(self.sampling),
            max_prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            is_minillm_contract=self == Protocol(),
        )


@dataclass(frozen=True)
class AnsweringModel:
    """The artifact that answers, and how it is opened."""

    path: Path
    runtime: str
    digest: str
    threads: int
    opener: Callable[..., Runtime] = open_runtime


@dataclass(frozen=True)
class Task:
    """One answer to be generated."""

    row: InstructionRow
    run: str
    seed: int


class Journal:
    """answers.jsonl of one model and protocol; lines of others stay and are not looked at."""

    def __init__(self, path: Path, model_digest: str, protocol: Protocol) -> None:
        self._path = path
        self._identity = {"artifact": model_digest, "protocol": protocol.digest}
        self._known: dict[tuple[str, str], Answer] = {}
        _drop_torn_line(path)
        for line in _lines(path):
            if all(line.get(key) == value for key, value in self._identity.items()):
                self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        try:
            self._known[line["row"], line["run"]] = Answer.from_dict(line["answer"])
        except (LookupError, TypeError, ValueError) as error:
            log.warning("%s: a line is not understood and its answer is generated again: %s", self._path, error)

    def find(self, row: InstructionRow, run: str) -> Answer | None:
        """The answer kept for a row in a run."""
        return self._known.get((row.digest, run))

    def pending(self, task: Task) -> bool:
        """True when the task has no answer yet, or its runtime failed."""
        answer = self.find(task.row, task.run)
        return answer is None or answer.status is Status.EXCEPTION

    def append(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> None:
        """Keep a batch: on disk before it is remembered."""
        lines = []
        for task, answer in zip(tasks, answers, strict=True):
            key = {"row": task.row.digest, "run": task.run} | self._identity
            lines.append(json.dumps(key | {"row_id": task.row.row_id, "answer": answer.to_dict()}, ensure_ascii=False))
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for task, answer in zip(tasks, answers, strict=True):
            self._known[task.row.digest, task.run] = answer


def _drop_torn_line(path: Path) -> None:
    """Cut what a kill left of a last line, so that the next one starts at the beginning of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def answer_all(
    rows: Sequence[InstructionRow], model: AnsweringModel, protocol: Protocol, journal: Journal, batch_size: int
) -> None:
    """Generate every answer that the journal lacks; the model is opened only when there is one.

    Raises:
        ConfigError: a prompt and an answer do not fit into the artifact's context.
        InputRejected, EnvironmentProblem: the artifact cannot be opened.
    """
    distinct = list({row.digest: row for row in rows}.values())
    tasks = [Task(row, run, seed) for run, seed in protocol.runs.items() for row in distinct]
    tasks = [task for task in tasks if journal.pending(task)]
    if not tasks:
        return
    with _opened(model, protocol) as (runtime, codec):
        prompts = _encode_all(codec, tasks, protocol.prompt_tokens)
        unreadable = [(task, one) for task in tasks if isinstance(one := prompts[task.row.digest], Exception)]
        journal.append([task for task, _ in unreadable], [failed(error) for _, error in unreadable])
        asked = [
            (task, Prompt(ids, task.row.digest, task.seed))
            for task in tasks
            if not isinstance(ids := prompts[task.row.digest], Exception)
        ]
        asked.sort(key=lambda pair: len(pair[1].ids))  # rows of one length need no padding
        batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        for batch in track(batches, f"answering {len(asked)} prompts, batches of {batch_size}"):
            answers = answer_batch(runtime, codec, [prompt for _, prompt in batch], protocol)
            journal.append([task for task, _ in batch], answers)


def _encode_all(codec: TextCodec, tasks: Sequence[Task], limit: int) -> dict[str, list[int] | Exception]:
    """Every prompt's first tokens by row digest; an error stays with its row."""
    found: dict[str, list[int] | Exception] = {}
    for row in {task.row.digest: task.row for task in tasks}.values():
        try:
            found[row.digest] = codec.encode(row.prompt)[:limit]
        except Exception as error:
            found[row.digest] = error
    return found


@contextmanager
def _opened(model: AnsweringModel, protocol: Protocol) -> Iterator[tuple[Runtime, TextCodec]]:
    """The artifact in its runtime, long enough for a prompt and an answer."""
    wanted = protocol.prompt_tokens + protocol.max_new_tokens
    with model.opener(model.runtime, model.path, threads=model.threads, context_length=wanted) as runtime:
        room = getattr(runtime, "context_length", wanted)
        if room < wanted:
            why = f"{protocol.prompt_tokens} tokens of prompt and {protocol.max_new_tokens} of answer, it holds {room}"
            command = f"--max-new-tokens {max(1, room - protocol.prompt_tokens)}, or a smaller --max-prompt-tokens"
            raise ConfigError(
                "the artifact's context is too short", where=str(model.path), why=why, next_command=command
            )
        yield runtime, open_codec(model.runtime, model.path, runtime)


def answer_batch(runtime: Runtime, codec: TextCodec, prompts: Sequence[Prompt], protocol: Protocol) -> list[Answer]:
    """One answer per prompt, whatever happens: a batch that fails is tried row by row, and a failure is its row's alone."""
    try:
        written = _generate(runtime, codec, prompts, protocol)
    except Exception as error:
        log.debug("a batch of %d failed and is repeated row by row: %s", len(prompts), error)
        return [_alone(runtime, codec, prompt, protocol) for prompt in prompts]
    return [_read(codec, tokens, protocol) for tokens in written]


def _alone(runtime: Runtime, codec: TextCodec, prompt: Prompt, protocol: Protocol) -> Answer:
    try:
        return _read(codec, _generate(runtime, codec, [prompt], protocol)[0], protocol)
    except Exception as error:
        return failed(error)


def _generate(runtime: Runtime, codec: TextCodec, prompts: Sequence[Prompt], protocol: Protocol) -> list[list[int]]:
    return runtime.generate_batch(prompts, protocol.max_new_tokens, codec.stop_ids, protocol.sampling)


def _read(codec: TextCodec, tokens: list[int], protocol: Protocol) -> Answer:
    try:
        return judge_answer(tokens, codec.decode(tokens), protocol.max_new_tokens)
    except Exception as error:
        return judge_answer(tokens, None, protocol.max_new_tokens, f"{type(error).__name__}: {error}")
