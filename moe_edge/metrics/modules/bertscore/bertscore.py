"""BERTScore F of an encoder that lies in a local folder, the best of the references, averaged over rows, times 100.

An `evaluate` module that needs no hub: `evaluate.load("<this folder>")`, then `compute(..., encoder=FOLDER)`. Empty answers
and references get 0 here and never reach bert_score, which finds them by counting special tokens and misjudges encoders
that add other than two. The raw F, without a rescaling baseline: compare it only between runs of the same encoder.
"""

import bert_score
import datasets
import evaluate

CITATION = "Zhang et al., BERTScore: Evaluating Text Generation with BERT, 2020"


class Bertscore(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """predictions: texts; references: a list of texts for each. Returns `score` (mean) and `scores` (per row)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description="predictions: [str], references: [[str]]",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], encoder: str, layers: int, batch_size: int = 32
    ) -> dict[str, object]:
        pairs = [
            (row, text, one)
            for row, (text, many) in enumerate(zip(predictions, references, strict=True))
            for one in many
            if text.strip() and one.strip()
        ]
        scores = [0.0] * len(predictions)
        if pairs:
            scorer = bert_score.BERTScorer(model_type=encoder, num_layers=layers, device="cpu", batch_size=batch_size)
            f_P = scorer.score([text for _, text, _ in pairs], [one for _, _, one in pairs])[2]
            for (row, _, _), f in zip(pairs, f_P.tolist(), strict=True):
                scores[row] = max(scores[row], 100 * f)
        return {"score": sum(scores) / len(scores) if scores else None, "scores": scores}
