"""What the tests of the evaluation share: models with known logits, a device that answers at once, and a session over both."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.targets_io import load_target
from moe_edge.devices.detect import GGUF
from moe_edge.devices.transport import Completed
from moe_edge.evaluation.cells import ModelToMeasure, Session
from moe_edge.evaluation.validation import transformers_model

SAMPLES = {
    "schema": "moe-edge/samples@1",
    "runs": [{"issued_ns": 0, "prefilled_ns": 5_000_000, "token_ns": [6_000_000, 8_000_000, 10_000_000]}] * 2,
    "load_ns": 1,
    "baseline_rss_bytes": 10**7,
    "peak_rss_bytes": 10**8,
    "peak_uss_bytes": None,
}
VOCAB = 16
NOISE = {
    "teacher": 0.0,
    "hf": 0.05,
    "good.gguf": 0.1,
    "killed.gguf": 0.1,
    "other.gguf": 0.1,
    "bad.gguf": 3.0,
    "broken.gguf": np.nan,
}


class InstantTransport:
    """A device on which every artifact decodes 500 tokens/s, unless its name says that it is killed; keeps the jobs."""

    address = "fake"

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []

    @property
    def measured(self) -> list[str]:
        return [Path(job["path"]).name for job in self.jobs]

    def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
        self.jobs.append(json.loads(stdin))
        if "killed" in self.measured[-1]:
            return Completed(-9, b"", "")
        repacks = {"repacks": False} if "amx" in self.measured[-1] else {}
        return Completed(0, json.dumps(SAMPLES | repacks).encode(), "")


class KnownLogits:
    """A bigram model: the teacher's table plus noise."""

    def __init__(self, noise: float, vocab: int = VOCAB) -> None:
        self.vocab = vocab
        table_VV = np.random.default_rng(0).normal(0, 2, (vocab, vocab))
        self._table_VV = (table_VV + np.random.default_rng(1).normal(0, 1, (vocab, vocab)) * noise).astype(np.float32)

    def __enter__(self) -> "KnownLogits":
        return self

    def __exit__(self, *error: object) -> None: ...

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        return self._table_VV[ids_S]


class Opener:
    """Opens a model as the logits that its name says; remembers what it opened and what each runtime was told."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.options: dict[str, dict[str, str]] = {}

    def __call__(self, kind: str, path: Path, threads: int, context_length: int, **options: str) -> KnownLogits:
        self.opened.append(path.name)
        self.options[kind] = options
        if path.name == "unreadable.gguf":
            raise InputRejected("llama.cpp cannot load this file")
        return KnownLogits(NOISE[path.name], VOCAB - 1 if path.name == "other.gguf" else VOCAB)


def build_config(gates: dict[str, Any] | None = None, **settings: Any) -> BuildConfig:
    """The CPU target, perhaps with other limits, and a small shape of measurements."""
    target = load_target("cpu").model_dump(by_alias=True)
    target["runtime"]["threads"] = 1
    if gates is not None:
        target["gates"] = gates
    shape = {"prompt_tokens": 4, "new_tokens": 3, "repetitions": 2} | settings
    return BuildConfig.model_validate({"target": target, "validate": shape})


def some_models(folder: Path, *names: str) -> tuple[ModelToMeasure, ModelToMeasure, list[ModelToMeasure]]:
    """A teacher, a student, and GGUF files of these names; their content is anything."""
    files = []
    for name in names:
        path = folder / "gguf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF" + name.encode())
        files.append(ModelToMeasure(path, GGUF, f"artifacts/gguf/{name}", path.stat().st_size, "Q4_K_M", 4.5))
    for size, name in ((100, "hf"), (200, "teacher")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(bytes(size))
    teacher = transformers_model(folder / "teacher", "teacher", "teacher")
    return teacher, transformers_model(folder / "hf", "student", "artifacts/hf"), files


def new_session(folder: Path, opener: Opener, config: BuildConfig | None = None, **more: Any) -> Session:
    """A session that keeps its cells in `folder`, over three rows of 20 tokens."""
    rows_NS = np.random.default_rng(2).integers(VOCAB, size=(3, 20))
    folder.mkdir(parents=True, exist_ok=True)
    return Session(config or build_config(), rows_NS, folder, InstantTransport(), opener, **more)
