"""Train the demo teacher from scratch on two CPU cores, in one to two hours.

What: trains the tokenizer and a small `Qwen3MoeForCausalLM` on Dolly conversations and WikiText,
checkpoints as it goes, and exports the bfloat16 folder that ships in `moe_edge/demo/teacher`.
Why: a demo that starts from a really trained model, whose every byte can be made again.
How (all paths are the caller's):

    python -m moe_edge.demo.train --dolly-train dolly/train.jsonl \\
        --wikitext wikitext2/valid_unk.txt --out run/ --minutes 70
    python -m moe_edge.demo.train ... --resume           # go on after an interruption
    python -m moe_edge.demo.evaluate --teacher run/teacher --dolly-dev dolly/dev.jsonl

The schedule counts steps: `--minutes` only measures the speed once and turns it into `--steps`.
The last `--long-part` of the steps use rows of the full context instead of `--row-tokens`, so that
the model has seen every position it offers. Same seed, thread count and machine: same weights.

Shape suffixes: R rows of a batch, L tokens of a row, T = R x L, V vocabulary, H hidden.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from moe_edge.demo.checkpoint import (
    export_teacher,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from moe_edge.demo.corpus import (
    TokenStream,
    encode_documents,
    read_conversations,
    read_wikitext_sections,
    render,
)
from moe_edge.demo.model import DemoShape, balance_loss, build_config, build_model
from moe_edge.demo.tokenizer import build_tokenizer
from moe_edge.models.kernels import SORTED_LOOP

PROBE_STEPS = 3


@dataclass
class TrainSettings:
    """Everything that decides the final weights, besides the data and the model's shape."""

    steps: int = 0
    seed: int = 17
    batch_tokens: int = 4096
    row_tokens: int = 512
    long_part: float = 0.15
    peak_learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    decay_part: float = 0.5
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    experts_kernel: str = SORTED_LOOP


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, a plateau, then a cosine to 1 % of the peak at the last step."""
    peak = settings.peak_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    decay_start = settings.steps * (1.0 - settings.decay_part)
    if step < decay_start:
        return peak
    done = (step + 1 - decay_start) / (settings.steps - decay_start)
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def row_length(settings: TrainSettings, step: int, context_tokens: int) -> int:
    """Short rows first; full-context rows in the last part of the run."""
    long_start = settings.steps * (1.0 - settings.long_part)
    longest = min(context_tokens, settings.batch_tokens)
    return longest if step >= long_start else min(settings.row_tokens, longest)


def build_optimizer(model: Qwen3MoeForCausalLM, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; only matrices decay, norm gains do not."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=(0.9, 0.95), eps=1e-9, fused=True)


def train_step(
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.AdamW,
    batch: tuple[torch.Tensor, torch.Tensor],
    settings: TrainSettings,
    step: int,
) -> tuple[float, float]:
    """One update; returns the next-token loss in nats and the balance loss."""
    input_RL, label_RL = batch
    outputs = model.model(input_ids=input_RL, output_router_logits=True, use_cache=False)
    logits_TV = model.lm_head(outputs.last_hidden_state.flatten(0, 1))
    token_loss = functional.cross_entropy(logits_TV, label_RL.flatten())
    balance = balance_loss(outputs.router_logits, model.config.num_experts_per_tok)
    (token_loss + settings.balance_weight * balance).backward()  # type: ignore[no-untyped-call]  # torch
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return token_loss.item(), balance.item()


def load_texts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """All training texts: bare contents to train a tokenizer on, rendered chats afterwards."""
    conversations = read_conversations(args.dolly_train)
    sections = read_wikitext_sections(args.wikitext)
    if tokenizer is None:
        contents = [turn["content"] for chat in conversations for turn in chat]
        return contents + sections
    return [render(tokenizer, chat) for chat in conversations] + sections


def prepare_tokenizer(args: argparse.Namespace, shape: DemoShape) -> PreTrainedTokenizerBase:
    """The run's tokenizer: trained once, then read back from the run folder."""
    folder = args.out / "tokenizer"
    if not (args.resume and folder.exists()):
        texts = load_texts(args, None)
        tokenizer = build_tokenizer(texts, shape.vocab_size, shape.max_position_embeddings)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    return AutoTokenizer.from_pretrained(folder)


def steps_for_minutes(minutes: float, model: Qwen3MoeForCausalLM, stream: TokenStream, settings: TrainSettings) -> int:
    """Measure a few steps on a throw-away copy of the weights and fill the given time."""
    probe = Qwen3MoeForCausalLM(model.config)
    probe.set_experts_implementation(settings.experts_kernel)
    probe_settings = TrainSettings(**{**asdict(settings), "steps": 1000})
    optimizer = build_optimizer(probe, probe_settings)
    seconds = []
    for step in range(PROBE_STEPS):
        start = time.perf_counter()
        batch = stream.batch(step, settings.batch_tokens, settings.row_tokens)
        train_step(probe, optimizer, batch, probe_settings, step)
        seconds.append(time.perf_counter() - start)
    return max(1, int(minutes * 60 / min(seconds)))


@dataclass
class TrainState:
    """A run in memory: what changes with each step, and what a checkpoint brings back."""

    model: Qwen3MoeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    stream: TokenStream
    settings: TrainSettings
    optimizer: torch.optim.AdamW
    step: int = 0
    spent_s: float = 0.0


def prepare(args: argparse.Namespace, shape: DemoShape, settings: TrainSettings) -> TrainState:
    """Data, model and optimiser of a new run, or those of the run folder's checkpoint."""
    checkpoint = args.out / "checkpoint"
    resumes = args.resume and checkpoint.exists()
    if resumes:  # the checkpoint's settings win; only the end of the run may be moved
        wanted_steps = settings.steps
        settings = TrainSettings(**read_progress(checkpoint)["settings"])
        settings.steps = wanted_steps or settings.steps
    tokenizer = prepare_tokenizer(args, shape)
    documents = encode_documents(tokenizer, load_texts(args, tokenizer))
    stream = TokenStream(documents, seed=settings.seed)
    token_ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = build_model(build_config(shape, token_ids), settings.seed, settings.experts_kernel)
    if settings.steps == 0:
        settings.steps = steps_for_minutes(args.minutes, model, stream, settings)
    state = TrainState(model.train(), tokenizer, stream, settings, build_optimizer(model, settings))
    if resumes:
        progress = load_checkpoint(checkpoint, model, state.optimizer)
        state.step, state.spent_s = progress["step"], progress["train_seconds"]
    return state


def advance(state: TrainState, log_every: int) -> None:
    """Take one step and log it when due."""
    start = time.perf_counter()
    settings = state.settings
    context_tokens = state.model.config.max_position_embeddings
    row_tokens = row_length(settings, state.step, context_tokens)
    batch = state.stream.batch(state.step, settings.batch_tokens, row_tokens)
    losses = train_step(state.model, state.optimizer, batch, settings, state.step)
    seconds = time.perf_counter() - start
    state.step += 1
    state.spent_s += seconds
    if state.step % log_every == 0 or state.step == settings.steps:
        log_step(settings, state.step, losses, seconds, state.spent_s)


def save(state: TrainState, shape: DemoShape, out: Path) -> None:
    """Checkpoint the run and export the teacher as it is now."""
    progress = {
        "step": state.step,
        "train_seconds": state.spent_s,
        "epoch_tokens": state.stream.epoch_tokens,
        "settings": asdict(state.settings),
        "shape": asdict(shape),
    }
    save_checkpoint(out / "checkpoint", state.model, state.optimizer, progress)
    export_teacher(state.model, state.tokenizer, out / "teacher")


def run(args: argparse.Namespace, shape: DemoShape, settings: TrainSettings) -> Path:
    """Train to the last step (or to `--stop-after`); returns the exported teacher's folder."""
    state = prepare(args, shape, settings)
    last_step = state.settings.steps
    if args.stop_after > 0:
        last_step = min(last_step, args.stop_after)
    facts = json.dumps(asdict(state.settings))
    print(f"from step {state.step}; epoch tokens {state.stream.epoch_tokens:,}; {facts}")
    while state.step < last_step:
        advance(state, args.log_every)
        if state.step % args.checkpoint_every == 0 or state.step == last_step:
            save(state, shape, args.out)
    teacher: Path = args.out / "teacher"
    return teacher


def log_step(
    settings: TrainSettings,
    step: int,
    losses: tuple[float, float],
    seconds: float,
    spent_s: float,
) -> None:
    """One log line: position, losses, speed and the time left at the mean speed so far."""
    left_min = (settings.steps - step) * spent_s / step / 60
    print(
        f"step {step}/{settings.steps} loss {losses[0]:.4f} balance {losses[1]:.3f} "
        f"lr {learning_rate(settings, step - 1):.2e} "
        f"{settings.batch_tokens / seconds:,.0f} tokens/s "
        f"spent {spent_s / 60:.1f} min left {left_min:.1f} min",
        flush=True,
    )


def add_dataclass_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One option per dataclass field, with its type and default."""
    for field in fields(kind):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=field.type, default=field.default)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: data, output, time, and every setting and size by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dolly-train", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--minutes", type=float, default=70.0, help="used when --steps is 0")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--stop-after", type=int, default=-1, help="leave after this step")
    add_dataclass_options(parser, TrainSettings)
    add_dataclass_options(parser, DemoShape)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m moe_edge.demo.train`."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    values = vars(args)
    settings = TrainSettings(**{field.name: values[field.name] for field in fields(TrainSettings)})
    shape = DemoShape(**{field.name: values[field.name] for field in fields(DemoShape)})
    print(f"teacher written to {run(args, shape, settings)}")


if __name__ == "__main__":
    main()
