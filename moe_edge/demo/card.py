"""Release a finished training run: copy its teacher to a folder and write the model card.

What: `README.md` with architecture, data and licence, training facts and held-out measurements,
every number read from the run's own records.
Why: whoever finds the folder alone must see what it is, where it came from and how good it is.
How: `python -m moe_edge.demo.card --run run/ --evaluation evaluation.json --teacher DEST/`
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

TEACHER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

CARD = """---
license: cc-by-sa-3.0
language: en
pipeline_tag: text-generation
library_name: transformers
---

# moe-edge demo teacher

A small mixture-of-experts chat model, trained from scratch for the quickstart, the tests and the
examples of `moe-edge`. It writes English-looking text and follows the chat format; it knows next to
nothing, and its answers must not be relied on.

## Architecture

`Qwen3MoeForCausalLM`, {layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads}
key-value heads of {head_dim}, {experts} routed experts of width {width} in every layer, top-{top_k}
with normalised weights, no shared expert, vocabulary {vocab} (own byte-level BPE), context
{context} tokens, tied embeddings. {parameters:,} parameters, {routed_percent:.1f} % of them in
routed experts; {weight_bytes:,} bytes of bfloat16 weights.

## Data and licence

- `databricks-dolly-15k` (Databricks, Inc.), training part only, CC BY-SA 3.0. It contains
  passages from Wikipedia (CC BY-SA 3.0).
- WikiText-2, validation part (Stephen Merity and others; from Wikipedia), CC BY-SA 3.0.

The texts were rendered as chats (Dolly) or cut into sections (WikiText) and tokenised; nothing else
was changed. The weights and the tokenizer are offered under CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/) with credit to these sources. The held-out Dolly
part was used for the measurements below and never for training.

## Training

    python -m moe_edge.demo.train --dolly-train dolly/train.jsonl \\
        --wikitext wikitext2/valid_unk.txt --out run/ --steps {steps} --seed {seed}

| | |
|---|---|
| Machine class | {machine} |
| Time in training steps | {minutes:.0f} minutes |
| Tokens seen | {tokens:,} ({epochs:.2f} epochs of {epoch_tokens:,}) |
| Mean speed | {speed:,.0f} tokens/s |
| Steps, tokens per step | {steps}, {batch_tokens} |
| Row length | {row_tokens}; {context} in the last {long_percent:.0f} % of the steps |
| Optimiser | AdamW, peak {peak}, betas 0.9 and 0.95, weight decay {decay}, gradient norm {clip} |
| Schedule | {warmup} warm-up steps, plateau, cosine over the last {decay_percent:.0f} % |
| Expert balance | Switch loss per layer, weight {balance} |
| Seed | {seed} |

{note}

## Held-out measurements

{conversations} Dolly conversations that were not trained on, shipped bfloat16 weights computed in
float32:

| | |
|---|---|
| Bits per byte | **{bpb:.3f}** |
| Nats per token | {nats:.3f} over {scored_tokens:,} tokens |
| Content bytes | {scored_bytes:,} |
| Conversations cut at {context} tokens | {cut} |

Bits per byte: the bits of all tokens of the rendered conversation, chat markers included, over the
UTF-8 bytes of instruction, input and output. The first token has no context and is not scored. Of a
conversation cut at the context only the bytes of the kept text count.

Share of the routed tokens on the same text ({even:.2f} % would be even):

| Layer | Least used expert | Most used expert |
|---|---|---|
{load_rows}
"""


def weight_facts(model_path: Path) -> dict[str, int]:
    """Parameters, routed parameters and bytes of the weights as delivered."""
    facts = {"parameters": 0, "routed": 0, "weight_bytes": model_path.stat().st_size}
    with safe_open(model_path, framework="pt") as weights:
        for name in weights.keys():
            count = 1
            for size in weights.get_slice(name).get_shape():
                count *= size
            facts["parameters"] += count
            facts["routed"] += count if ".experts." in name else 0
    return facts


def load_rows(expert_shares: list[list[float]]) -> str:
    """One table line per layer with the least and the most used expert."""
    return "\n".join(
        f"| {layer} | {100 * min(shares):.2f} % | {100 * max(shares):.2f} % |"
        for layer, shares in enumerate(expert_shares)
    )


def architecture_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The card's architecture words from `config.json`."""
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "experts": config["num_experts"],
        "width": config["moe_intermediate_size"],
        "top_k": config["num_experts_per_tok"],
        "vocab": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "even": 100 / config["num_experts"],
    }


def training_facts(progress: dict[str, Any]) -> dict[str, Any]:
    """The card's training words from the last checkpoint's progress record."""
    settings = progress["settings"]
    tokens = progress["step"] * settings["batch_tokens"]
    return {
        "steps": progress["step"],
        "seed": settings["seed"],
        "minutes": progress["train_seconds"] / 60,
        "tokens": tokens,
        "epoch_tokens": progress["epoch_tokens"],
        "epochs": tokens / progress["epoch_tokens"],
        "speed": tokens / progress["train_seconds"],
        "batch_tokens": settings["batch_tokens"],
        "row_tokens": settings["row_tokens"],
        "long_percent": 100 * settings["long_part"],
        "peak": settings["peak_learning_rate"],
        "decay": settings["weight_decay"],
        "clip": settings["clip_norm"],
        "warmup": settings["warmup_steps"],
        "decay_percent": 100 * settings["decay_part"],
        "balance": settings["balance_weight"],
    }


def build_card(teacher: Path, run: Path, evaluation_path: Path, machine: str, note: str) -> str:
    """Fill the card from the teacher folder, the run's progress and the evaluation record."""
    evaluation = json.loads(evaluation_path.read_text(encoding="utf-8"))
    progress = json.loads((run / "checkpoint" / "progress.json").read_text(encoding="utf-8"))
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    weights = weight_facts(teacher / "model.safetensors")
    return CARD.format(
        **architecture_facts(config),
        **training_facts(progress),
        parameters=weights["parameters"],
        routed_percent=100 * weights["routed"] / weights["parameters"],
        weight_bytes=weights["weight_bytes"],
        machine=machine,
        note=note,
        conversations=evaluation["conversations"],
        bpb=evaluation["bits_per_byte"],
        nats=evaluation["nats_per_token"],
        scored_tokens=evaluation["scored_tokens"],
        scored_bytes=evaluation["scored_bytes"],
        cut=evaluation["cut_conversations"],
        load_rows=load_rows(evaluation["expert_shares"]),
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m moe_edge.demo.card`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the run folder of train.py")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON of evaluate.py")
    parser.add_argument("--teacher", type=Path, required=True, help="folder to release into")
    parser.add_argument("--machine", default="2 CPU cores")
    parser.add_argument("--note", default="", help="a sentence about this very run")
    args = parser.parse_args(argv)
    args.teacher.mkdir(parents=True, exist_ok=True)
    for name in TEACHER_FILES:
        source = args.run / "teacher" / name
        if source.exists():
            shutil.copyfile(source, args.teacher / name)
    card = build_card(args.teacher, args.run, args.evaluation, args.machine, args.note)
    (args.teacher / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
