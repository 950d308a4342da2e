"""The tokenizer that an artifact carries against the student's: the same ids for a multilingual text, and the text back.

A tokenizer that is almost right gives a model that is almost sensible, and nothing else reports it. llama.cpp reads its
tokenizer from the GGUF file, onnxruntime-genai from the files beside the graph; both are asked themselves.
"""

from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import EnvironmentProblem, GateFailed
from moe_edge.runtimes.base import Runtime

ROUND_TRIP = (
    "Hello world!  I've 3 or 33 apples;\tit's 1.5 % more.\n\nDer Fluß hört's, «déjà vu» n'est-ce pas?\n"
    "我想在apple工作1314天 нещо на Български العربية हिन्दी 한국어 🚀🦙 def f(x):\n    return x[1:]  # YES\n"
)


def check_tokenizer(kind: str, tokenizer: Any, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """{"tokens", "equal", "text_returns"} of the artifact's own tokenizer on the fixed text.

    Args:
        kind: the artifact's name in messages.
        tokenizer: the student's.
        runtime: the open artifact (llama.cpp's answers itself).
        folder: the artifact's path (for onnxruntime-genai).

    Raises:
        GateFailed: the ids differ from the student's.
        EnvironmentProblem: onnxruntime-genai is not installed.
    """
    expected = list(tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"])
    ask = getattr(runtime, "tokenize", None)
    ids, text = (list(ask(ROUND_TRIP)), None) if ask is not None else _genai(folder)
    if ids not in (expected, list(tokenizer(ROUND_TRIP)["input_ids"])):  # genai adds the automatic tokens
        first = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(ids))
        why = f"{len(ids)} ids against {len(expected)}, the first difference at {first}: {ids[first : first + 4]}"
        why += f" against {expected[first : first + 4]}"
        raise GateFailed(
            f"the tokenizer of {kind} is not the student's", where=str(folder), why=why,
            next_command="deliver the other format alone: --set export.formats=[gguf], or [onnx]",
        )  # fmt: skip
    text = tokenizer.decode(ids) if text is None else text
    return {"tokens": len(ids), "equal": True, "text_returns": text == ROUND_TRIP}


def _genai(folder: Path) -> tuple[list[int], str]:
    """onnxruntime-genai's ids of the text, and the text of those ids; only the tokenizer is loaded."""
    try:
        from onnxruntime_genai import Tokenizer
    except ModuleNotFoundError as missing:
        raise EnvironmentProblem(
            "onnxruntime-genai is not installed",
            why="it checks the tokenizer of ONNX folders",
            next_command="pip install 'onnxruntime-genai==0.18.*'",
        ) from missing
    tokenizer = Tokenizer(str(folder))
    ids = [int(token) for token in tokenizer.encode(ROUND_TRIP)]
    return ids, str(tokenizer.decode(ids))
