"""chrF2 by sacrebleu: F-score of character n-grams, the best of the references, averaged over rows.

An `evaluate` module that needs no hub: `evaluate.load("<this folder>")`. It needs no word tokenizer, so it also judges what
ROUGE cannot see (other scripts) and BLEU judges badly (a single word). The mean over
rows, not sacrebleu's corpus chrF, which weighs rows by their length.
"""

import datasets
import evaluate
import sacrebleu

CITATION = "Popovic, chrF: character n-gram F-score for automatic MT evaluation, 2015"


class Chrf(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
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
        metric = sacrebleu.CHRF()
        scores = [metric.sentence_score(text, many).score for text, many in zip(predictions, references, strict=True)]
        return {"score": sum(scores) / len(scores) if scores else None, "scores": scores}
