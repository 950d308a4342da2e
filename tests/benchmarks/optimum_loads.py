"""Does optimum's ORTModelForCausalLM open an exported ONNX folder, and does it say what the checkpoint says in transformers?

    python tests/benchmarks/optimum_loads.py FOLDER CHECKPOINT      # in an environment of its own, without moe-edge:
    pip install optimum-onnx onnxruntime "transformers<4.58" torch

optimum-onnx cannot be installed beside transformers 5, so this script imports nothing of moe-edge. FOLDER is an export with
`export.onnx.precision=fp32`, CHECKPOINT the model it was made from. One JSON line: the largest difference of two logits on
a prompt, and how many of 16 greedy tokens are the same.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPT, NEW_TOKENS = "The quick brown fox jumps over the lazy dog while", 16


def main(folder: str, checkpoint: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    ids_1S = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    inputs = {"input_ids": ids_1S, "attention_mask": torch.ones_like(ids_1S)}
    found = []
    for model in (
        ORTModelForCausalLM.from_pretrained(folder, file_name="model.onnx", use_io_binding=False),
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    ):
        with torch.no_grad():
            logits = model(**inputs).logits
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=-1)
        found.append((logits, written[0, ids_1S.shape[1] :].tolist()))
    (ours, our_ids), (theirs, their_ids) = found
    same = sum(a == b for a, b in zip(our_ids, their_ids, strict=True))
    difference = float((ours - theirs).abs().max())
    print(json.dumps({"folder": folder, "max_abs_logit": difference, "greedy_same": same, "greedy": NEW_TOKENS}))


if __name__ == "__main__":
    main(*sys.argv[1:])
