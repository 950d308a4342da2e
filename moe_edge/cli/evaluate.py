"""`moe-edge evaluate`: an artifact's answers to instruction sets, scored."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_edge.contracts.errors import ConfigError, GateFailed

Data = Annotated[list[str], typer.Option("--data", help="Instruction sets (.jsonl), separated by commas or repeated.")]
Encoder = Annotated[
    Path | None, typer.Option("--bertscore", help="Also BERTScore, by the encoder in this folder, or 'minilm'.")
]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file, an ONNX folder or a checkpoint folder.")],
    data: Data,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows of each set.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="One run per seed.")] = "10,20,30,40,50",
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely token; one run.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampled answers.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among the k most likely tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the likeliest of this mass; 1 = all.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", min=1, help="A prompt keeps its first N.")
    ] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts side by side (not GGUF: one after another).")
    ] = 8,
    max_empty_rate: Annotated[
        float, typer.Option("--max-empty-rate", min=0, max=1, help="Gate: larger shares fail (exit 10).")
    ] = 0.1,
    max_truncated_rate: Annotated[
        float, typer.Option("--max-truncated-rate", min=0, max=1, help="Gate of answers without an end, likewise.")
    ] = 0.5,
    empty_references: Annotated[
        Literal["exclude", "score"],
        typer.Option("--empty-references", help="Rows without reference: left out, or right when the answer is empty."),
    ] = "exclude",
    bertscore: Encoder = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default runs/<artifact>-evaluate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Let an artifact answer instruction sets and score the answers: ROUGE-L, BLEU, chrF, exact match; resumable."""
    from moe_edge.devices.detect import refuse_bad_headers
    from moe_edge.texts.instruction_rows import read_instruction_sets

    runs, sets = _seeds(seeds), read_instruction_sets(_paths(data), limit)
    refuse_bad_headers(artifact)  # before the imports below, which take seconds

    from moe_edge.evaluation.answers import Protocol
    from moe_edge.evaluation.instructions import EvaluationSettings, run
    from moe_edge.pipeline import locked
    from moe_edge.reporting.evaluation_text import evaluation_text
    from moe_edge.runtimes.sampling import GREEDY, Sampling
    from moe_edge.storage.files import model_name

    sampling = GREEDY if greedy else Sampling(temperature, top_k, top_p)
    protocol = Protocol(sampling, runs, max_prompt_tokens, max_new_tokens)
    settings = EvaluationSettings(protocol, batch_size, max_empty_rate, max_truncated_rate, empty_references, bertscore)
    folder = out if out is not None else Path("runs") / f"{model_name(str(artifact))}-evaluate"
    with locked(folder):
        result = run(artifact, sets, settings, folder)
    print(json.dumps(result.to_dict(), indent=1) if as_json else evaluation_text(result))
    if result.verdict != "pass":
        raise GateFailed("the answers missed their gate", where=str(folder), why="; ".join(result.reasons))


def _seeds(text: str) -> tuple[int, ...]:
    """ "10,20" as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: not numbers", why="expected e.g. 10,20,30") from error


def _paths(given: list[str]) -> list[Path]:
    """Every file; a name that exists as it is may hold commas."""
    return [Path(part) for one in given for part in ([one] if Path(one).exists() else one.split(",")) if part]
