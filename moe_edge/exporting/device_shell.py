"""run.sh of a GGUF bundle for Android: files checked and speed measured with llama.cpp's own programs, without Python.

A phone's shell (adb, Termux) has sha256sum and awk, and llama.cpp is one push away; Python with llama-cpp-python is not. The
script is plain POSIX sh. It cannot score the golden prompts against the teacher, which needs logits (run.py does): it shows
what the model answers to them.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_edge.models.loading import load_tokenizer
from moe_edge.storage.files import sha256_file
from moe_edge.storage.folders import files_of

SCRIPT, SUMS, PROMPTS = "run.sh", "SHA256SUMS", "prompts"

_TEMPLATE = """\
#!/bin/sh
# Checks this bundle's files, measures the speed and answers the golden prompts with llama.cpp's programs.
#   sh run.sh [FOLDER]     FOLDER holds llama-bench and llama-completion (or llama-cli); without it they are on the PATH.
# Ends with 0 (done), 1 (a program failed), 4 (a file is missing or changed), 5 (a program is missing).
set -u
folder=${1:-}
if [ -n "$folder" ]; then
    folder=$(cd "$folder" && pwd) || exit 5
    PATH="$folder:$PATH" LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    export PATH LD_LIBRARY_PATH
fi
cd "$(dirname "$0")" || exit 4

need() {
    for name in "$@"; do
        command -v "$name" && return
    done
    echo "missing: $* (build llama.cpp for this device and give its folder: sh run.sh FOLDER)" >&2
    exit 5
}
need sha256sum >/dev/null
if ! told=$(sha256sum -c @SUMS@ 2>/dev/null); then
    echo "a file is missing or changed:" >&2
    echo "$told" | grep -v ': OK$' >&2
    exit 4
fi
echo "files: ok"

bench=$(need llama-bench) || exit 5
writer=$(need llama-completion llama-cli) || exit 5
table=$("$bench" @COMMON@@BENCH_CACHE@ -p 128 -n 64 -r 5 2>/dev/null) || { echo "llama-bench failed" >&2; exit 1; }
echo "$table" | awk -F'|' '/pp128/ {print "prompt tokens/s:" $(NF-1)} /tg64/ {print "decode tokens/s:" $(NF-1)}'

for prompt in @PROMPTS@/*.txt; do
    echo "--- $prompt"
    "$writer" @COMMON@ -c @CONTEXT@@CACHE@ -no-cnv --temp 0 -n 32 -f "$prompt" 2>/dev/null </dev/null ||
        { echo "$writer failed" >&2; exit 1; }
    echo
done
"""


def common_options(model: str, runtime: Mapping[str, Any]) -> str:
    """What every program of llama.cpp gets: model, threads, layers on the accelerator."""
    threads = f" -t {runtime['threads']}" if runtime["threads"] else ""
    return f"-m {shlex.quote(model)}{threads} -ngl {runtime['gpu_layers']}"


def cache_options(runtime: Mapping[str, Any], bench: bool = False) -> str:
    """An 8-bit KV cache where the target has one; llama-bench spells flash attention otherwise."""
    return f" -fa {1 if bench else 'on'} -ctk q8_0 -ctv q8_0" if runtime["kv_cache"] == "q8_0" else ""


def shell_runner(model: str, runtime: Mapping[str, Any]) -> str:
    """The script for one artifact.

    Args:
        model: the GGUF file's place in the bundle.
        runtime: threads, gpu_layers, context_length, kv_cache.
    """
    values = {
        "SUMS": SUMS,
        "PROMPTS": PROMPTS,
        "COMMON": common_options(model, runtime),
        "CONTEXT": runtime["context_length"],
        "CACHE": cache_options(runtime),
        "BENCH_CACHE": cache_options(runtime, bench=True),
    }
    text = _TEMPLATE
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def prompt_texts(tokenizer: Path, prompts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Place in the bundle -> text of every golden prompt, by the tokenizer in a folder."""
    decode = load_tokenizer(tokenizer).decode
    texts = [decode(prompt["ids"], skip_special_tokens=True) for prompt in prompts]
    return {f"{PROMPTS}/{number}.txt": str(text) for number, text in enumerate(texts, 1)}


def sums(folder: Path) -> str:
    """The content of SHA256SUMS over every file that lies in a folder now."""
    return "".join(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_of(folder))
