"""Exact match as Super-NaturalInstructions measures it: equal to one of the references after lower case, without
punctuation and with single spaces; the share of such answers times 100.

An `evaluate` module that needs no hub: `evaluate.load("<this folder>")`. A text of punctuation alone is compared as it is.
"""

import string

import datasets
import evaluate

CITATION = "Wang et al., Super-NaturalInstructions, 2022"
_DROPPED = str.maketrans("", "", string.punctuation)


class ExactMatch(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """predictions: texts; references: a list of texts for each. Returns `score` (mean) and `scores` (0 or 100)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description="predictions: [str], references: [[str]]",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, object]:
        scores = [
            100.0 * (bool(_plain(text)) and _plain(text) in [_plain(one) for one in many])
            for text, many in zip(predictions, references, strict=True)
        ]
        return {"score": sum(scores) / len(scores) if scores else None, "scores": scores}


def _plain(text: str) -> str:
    """The text as it is compared."""
    words = " ".join(text.lower().split())
    return " ".join(words.translate(_DROPPED).split()) or words
