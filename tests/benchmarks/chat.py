"""Chat with every artifact of a build through the runtimes' own public interfaces, as a user's application would.

GGUF in llama-cpp-python's chat completion, the ONNX folder in onnxruntime-genai, artifacts/hf in transformers; and the
full-precision exports in export/reference greedily beside transformers, up to its first near-tie.

    python -m tests.benchmarks.chat runs/demo-teacher-cpu --prompt "What is the capital of France?"
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from moe_edge.exporting.parity import NEAR_TIE_LOGITS
from moe_edge.exporting.parity_rows import GREEDY_TOKENS, prompt_ids
from moe_edge.runtimes.llama_cpp import repack_is_safe

NEW_TOKENS = 40


def open_llama(path: Path, **options: Any) -> Any:
    """`llama_cpp.Llama` as anybody opens it, except for the rearranged weights where those crash."""
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def safe_defaults() -> Any:
        params = defaults()
        params.use_extra_bufts = repack_is_safe()
        return params

    with patch.object(llama_cpp, "llama_model_default_params", safe_defaults):
        return Llama(str(path), n_ctx=512, verbose=False, **options)


def chat_gguf(path: Path, prompt: str) -> str:
    model = open_llama(path)
    answer = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=NEW_TOKENS)
    model.close()
    return str(answer["choices"][0]["message"]["content"])


def chat_onnx(folder: Path, prompt: str) -> str:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": prompt}])
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return str(tokenizer.decode(_genai_greedy(model, ids, NEW_TOKENS)))


def _genai_greedy(model: Any, ids: Any, new_tokens: int) -> np.ndarray:
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.asarray(ids, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.asarray(generator.get_sequence(0))[len(ids) :]


def chat_hf(folder: Path, prompt: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def greedy_agreement(run: Path) -> dict[str, Any]:
    """The first greedy tokens of the full-precision exports, each in its own engine, beside transformers."""
    import onnxruntime_genai as og
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "artifacts" / "hf"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    ids = prompt_ids(tokenizer)
    expected, margins, sequence = [], [], list(ids)
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            best = model(torch.tensor([sequence])).logits[0, -1].topk(2)
            expected.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 3))
            sequence.append(expected[-1])
    compared = next((i for i, margin in enumerate(margins) if margin < NEAR_TIE_LOGITS), GREEDY_TOKENS)
    onnx = _genai_greedy(og.Model(str(run / "export/reference/onnx-fp32")), ids, GREEDY_TOKENS).tolist()
    llama = open_llama(run / "export/reference/F16.gguf")
    gguf = []
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        gguf.append(token)
        if len(gguf) == GREEDY_TOKENS:
            break
    ends = {int(end) for end in np.atleast_1d(model.generation_config.eos_token_id)}
    stop = next(
        (i for i, token in enumerate(expected) if token in ends), GREEDY_TOKENS
    )  # genai leaves the end token out
    length = min(compared, stop)
    return {
        "hf": expected, "gguf_f16": gguf, "onnx_fp32": onnx, "compared": length, "smallest_margin_logits": min(margins),
        "equal": expected[:length] == gguf[:length] == onnx[:length],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompt", default="What is the capital of France?")
    options = parser.parse_args()
    for path in sorted((options.run / "artifacts/gguf").glob("*.gguf")):
        print(
            json.dumps(
                {"artifact": path.name, "runtime": "llama-cpp-python", "answer": chat_gguf(path, options.prompt)}
            )
        )
    onnx = options.run / "artifacts/onnx"
    print(json.dumps({"artifact": "onnx", "runtime": "onnxruntime-genai", "answer": chat_onnx(onnx, options.prompt)}))
    hf = options.run / "artifacts/hf"
    print(json.dumps({"artifact": "hf", "runtime": "transformers", "answer": chat_hf(hf, options.prompt)}))
    print(json.dumps({"name": "greedy at full precision", **greedy_agreement(options.run)}))


if __name__ == "__main__":
    main()
