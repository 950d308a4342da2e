"""The tokenizer that an artifact carries against the student's: a multilingual text to the same ids, and those to the same text.

A tokenizer that is almost right gives a model that is almost sensible, and nothing else reports it. llama.cpp reads its
tokenizer from the GGUF file, onnxruntime-genai from the files beside the graph; both are asked themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.contracts.errors import EnvironmentProblem, GateFailed
from moe_edge.runtimes.base import Runtime

ROUND_TRIP = (
    "Hello world!  I've 3 or 33 apples;\tit's 1.5 % more.\n\nDer Fluß hört's, «déjà vu» n'est-ce pas?\n"
    "我想在apple工作1314天 нещо на Български العربية हिन्दी 한국어 🚀🦙 def f(x):\n    return x[1:]  # YES\n"
)


def check_tokenizer(kind: str, tokenizer: Any, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """{"tokens", "equal", "text_returns"} of the artifact's own tokenizer on the fixed text.

    `text_returns` says whether decoding gives the very text; a student whose tokenizer normalizes it does not, either.

    Args:
        kind: the artifact's name in messages.
        tokenizer: the student's.
        runtime: the open artifact (llama.cpp's answers itself).
        folder: the artifact's path (for onnxruntime-genai).

    Raises:
        GateFailed: the ids differ from the student's, or what they decode to.
        EnvironmentProblem: onnxruntime-genai is not installed.
    """
    expected = list(tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"])
    ids, text = _llama(runtime, expected) if hasattr(runtime, "tokenize") else _genai(folder, expected)
    if ids not in (expected, list(tokenizer(ROUND_TRIP)["input_ids"])):  # genai adds the automatic tokens
        first = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(ids))
        why = f"{len(ids)} ids against {len(expected)}, the first difference at {first}: {ids[first : first + 4]}"
        why += f" against {expected[first : first + 4]}"
        raise GateFailed(
            f"the tokenizer of {kind} is not the student's",
            where=str(folder),
            why=why,
            next_command="deliver the other format alone: --set export.formats=[gguf], or [onnx]",
        )
    students = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if text not in (students, students.removeprefix(" ")):  # llama.cpp takes back the space that it puts before a text
        at = next((i for i, pair in enumerate(zip(text, students, strict=False)) if pair[0] != pair[1]), len(text))
        part = slice(max(0, at - 8), at + 8)
        raise GateFailed(
            f"{kind} decodes the student's ids to another text",
            where=str(folder),
            why=f"the first difference is at character {at}: {text[part]!r} against {students[part]!r}",
            next_command="deliver the other format alone: --set export.formats=[gguf], or [onnx]",
        )
    return {"tokens": len(ids), "equal": True, "text_returns": text == ROUND_TRIP}


def _llama(runtime: Any, expected: Sequence[int]) -> tuple[list[int], str]:
    """llama.cpp's ids of the text, and its text of the student's ids."""
    return list(runtime.tokenize(ROUND_TRIP)), runtime.detokenize(expected).decode("utf-8", "replace")


def _genai(folder: Path, expected: Sequence[int]) -> tuple[list[int], str]:
    """onnxruntime-genai's ids of the text, and its text of the student's ids; only the tokenizer is loaded."""
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
    return ids, str(tokenizer.decode(np.asarray(expected, dtype=np.int32)))
