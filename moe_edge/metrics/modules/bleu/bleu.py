"""Corpus BLEU by sacrebleu (13a tokens, exponential smoothing) on effective order, so that answers of fewer than four words
can score.

An `evaluate` module that needs no hub: `evaluate.load("<this folder>")`. `statistics` are the sufficient statistics of
every row, [matches of 1..4-grams, 1..4-grams, words of the answer, words of the closest reference]: their sum over any
rows gives the corpus BLEU of those rows, which is what a bootstrap needs.
"""

import datasets
import evaluate
import sacrebleu

CITATION = "Papineni et al., BLEU, 2002; Post, A Call for Clarity in Reporting BLEU Scores, 2018"


class Bleu(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """predictions: texts; references: a list of texts for each. Returns `score` (corpus), `scores` and `statistics`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description="predictions: [str], references: [[str]]",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, object]:
        metric = sacrebleu.BLEU(effective_order=True)
        rows = [metric.sentence_score(text, many) for text, many in zip(predictions, references, strict=True)]
        statistics = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]
        return {
            "score": self.corpus_bleu([sum(column) for column in zip(*statistics, strict=True)]) if rows else None,
            "scores": [row.score for row in rows],
            "statistics": statistics,
        }

    @staticmethod
    def corpus_bleu(sums: list[int]) -> float:
        """BLEU of summed statistics, as `score` is computed; 0 when nothing matches."""
        matches, ngrams, (words, reference_words) = list(sums[:4]), list(sums[4:8]), sums[8:]
        result = sacrebleu.BLEU.compute_bleu(
            matches, ngrams, words, reference_words, smooth_method="exp", effective_order=True
        )
        return float(result.score)
