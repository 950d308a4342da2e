"""Parity of every family: `moe-edge export` on tiny random models with a real tokenizer, and what it measured.

    python -m tests.benchmarks.bench_parity [FAMILY ...] [--work DIR]

Each family is exported as a user would do it, GGUF and ONNX one after the other (a refusal of one must not hide the other):
6 experts, top-2, random weights of a trained model's scale, sizes of 256 so that K-quants apply. The numbers are those of
the export's own parity.json, against transformers in float32. max|d| and greedy tokens are of GGUF F16 and ONNX fp32, KL of
the delivered Q4_K_M and int4 files; `clear` are the tokens of short rows whose
routers, and those of the tokens before them, are all further from a tie than .001 (ONNX) or .005 (GGUF). Random models
are the worst case of a quantizer: their routers and logits are no trained ones. One JSON line per export, then a Markdown
table; a refusal stands there with its reason.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_edge.formulas.ffn import Ffn
from moe_edge.models.dense import DENSE_OF, build_dense
from moe_edge.models.loading import save_student
from tests.exporting.gguf_models import LLAMA3, REPRESENTABLE, llama_checkpoint
from tests.exporting.onnx_models import CASES
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_model

SIZE = {"hidden": 256, "width": 256}
# llama: what a user brings; llama 3: with the scaled rotation of 3.1 and 3.2, on positions that need it
LLAMAS: dict[str, dict[str, Any]] = {"dense llama": {}, "dense llama 3": {"rope_parameters": LLAMA3}}
DENSE = (*(f"dense {dense}" for dense in dict.fromkeys(DENSE_OF.values())), *LLAMAS)
FULL = {"gguf": "gguf F16", "onnx": "onnx fp32"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[*ALL_FAMILIES, *DENSE])
    parser.add_argument("--work", type=Path, help="folder that keeps checkpoints and exports")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-edge-parity-") as scratch:
        rows = list(_lines(options.families, options.work or Path(scratch)))
    print(_table(rows))


def _lines(families: list[str], work: Path) -> Iterator[Row]:
    for family in families:
        model = _model(work, family)
        for file_format in FULL:
            row = {"benchmark": "parity", "family": family, "format": file_format} | _exported(model, file_format, work)
            print(json.dumps(row), flush=True)
            yield row


def _model(work: Path, family: str) -> Path:
    if family in LLAMAS:
        sizes = {"hidden_size": SIZE["hidden"], "intermediate_size": SIZE["width"]}
        return llama_checkpoint(work, family.replace(" ", "-"), **sizes, **LLAMAS[family])
    return _dense(work, family.removeprefix("dense ")) if family.startswith("dense ") else _mixture(work, family)


def _mixture(work: Path, family: str) -> Path:
    return tiny_checkpoint(work, family, **(REPRESENTABLE.get(family, {}) | CASES.get(family, {}) | SIZE))


def _dense(work: Path, dense: str) -> Path:
    """A dense student of that class, as the action `dense` makes it."""
    source = next(family for family, made in DENSE_OF.items() if made == dense)
    teacher = tiny_checkpoint(work, source, **(REPRESENTABLE[source] | SIZE), name=f"of-{dense}")
    vocabulary = json.loads((teacher / "config.json").read_text())["vocab_size"]
    model = tiny_model(source, vocab=vocabulary, **(REPRESENTABLE[source] | SIZE))
    generator, (hidden, width) = torch.Generator().manual_seed(1), (SIZE["hidden"], SIZE["width"])
    networks = [
        Ffn(*(shape[1] ** -0.5 * torch.randn(*shape, generator=generator) for shape in shapes))
        for shapes in [[(width, hidden), (width, hidden), (hidden, width)]] * model.config.num_hidden_layers
    ]
    save_student(build_dense(model, networks), teacher, work / f"dense-{dense}")
    return work / f"dense-{dense}"


def _exported(model: Path, file_format: str, work: Path) -> Row:
    """What the command says about one format: its parity rows, or why it refused."""
    out = work / f"{model.name}-{file_format}"
    command = [sys.executable, "-m", "moe_edge", "export", str(model), "--target", "cpu", "--out", str(out)]
    settings = ["--set", f"export.formats=[{file_format}]", "--set", "export.bundle=false"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    if done.returncode:
        return {"exit": done.returncode, "refused": _words(done.stderr)}
    found = json.loads((out / "export" / "parity.json").read_text())
    rows = {row["artifact"]: row for row in (found["rows"] if isinstance(found, dict) else found)}
    full = rows.pop(FULL[file_format])
    delivered = {name.split()[1]: round(row["kl_nats"], 5) for name, row in rows.items() if "delivered" in name}
    return {
        "exit": 0, "max_abs_logit": full["max_abs_logit"], "clear_max_abs_logit": full["clear_max_abs_logit"],
        "clear_tokens": full["clear_tokens"], "tokens": full["clear_candidates"], "kl_nats": full["kl_nats"],
        "greedy": f"{full['greedy_equal']}/{full['greedy_compared']}", "delivered_kl_nats": delivered,
    }  # fmt: skip


def _words(stderr: str) -> str:
    """The error's first line and its reason."""
    lines = [line.strip() for line in stderr.splitlines()]
    first = next((line for line in lines if line.startswith("moe-edge:")), lines[-1] if lines else "no words")
    reasons = [line.removeprefix("why:").strip() for line in lines if line.startswith("why:")]
    return ": ".join([first.removeprefix("moe-edge:").strip(), *reasons])


def _table(rows: list[Row]) -> str:
    formats = ("GGUF F16", "ONNX fp32")
    heads = [f"{name}: max abs d (on clear tokens) | greedy | KL of the files" for name in formats]
    lines = [f"| family | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [_cells(row) for row in rows if row["family"] == family]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> str:
    if "refused" in row:
        return f"refused ({row['exit']}): {row['refused']} | |"
    clear = row["clear_max_abs_logit"]
    told = "" if clear is None else f" ({clear:.1e} on {row['clear_tokens']} of {row['tokens']})"
    files = ", ".join(f"{name} {kl:.4f}" for name, kl in row["delivered_kl_nats"].items())
    return f"{row['max_abs_logit']:.1e}{told} | {row['greedy']} | {files}"


if __name__ == "__main__":
    main()
