"""ROUGE-L as MiniLLM and Super-NaturalInstructions measure it: F of the longest common subsequence, stemmed words, the best
of the references, times 100.

An `evaluate` module that needs no hub: `evaluate.load("<this folder>")`. The tokenizer of rouge_score keeps a-z and 0-9
only, so a text in another script scores 0 even against itself.
"""

import datasets
import evaluate
from rouge_score import rouge_scorer

CITATION = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"


class RougeL(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """predictions: texts; references: a list of texts for each. Returns `score` (mean) and `scores` (per row)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description="predictions: [str], references: [[str]]",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, object]:
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        scores = [
            max((100 * scorer.score(one, text)["rougeL"].fmeasure for one in many), default=0.0)
            for text, many in zip(predictions, references, strict=True)
        ]
        return {"score": sum(scores) / len(scores) if scores else None, "scores": scores}
