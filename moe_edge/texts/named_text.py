"""Rows of any text that a user names in one word: the calibration recipe, a file, or a data set of the `datasets` library.

`calibration` is the default recipe; a path is what `calibration.recipe` takes; `datasets:ID[:CONFIG[:SPLIT]]` is a hub id
or a local folder, also one of `save_to_disk`, whose rows are read as those of a .jsonl file (documents.py). The folder of a
`save_to_disk` may be named by its path alone.
A data set is streamed, so that only what fills the wanted tokens is fetched.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.documents import Document, document_of
from moe_edge.texts.recipes import DEFAULT, is_saved_dataset, load_recipe
from moe_edge.texts.rows import calibration_rows, document_rows

PREFIX = "datasets:"
CALIBRATION = "calibration"
SHUFFLE_ROWS = 10_000  # a streamed data set is shuffled within a window of so many rows


class DatasetName(NamedTuple):
    """A data set of the `datasets` library."""

    id: str
    config: str | None
    split: str


def dataset_name(text: str) -> DatasetName:
    """`datasets:ID[:CONFIG[:SPLIT]]` in its parts; an empty CONFIG is the data set's own, SPLIT is `train` where it lacks.

    Raises:
        ConfigError: the text has another form.
    """
    parts = text.removeprefix(PREFIX).split(":")
    if not text.startswith(PREFIX) or not parts[0] or len(parts) > 3:
        why = "expected datasets:ID[:CONFIG[:SPLIT]], for example datasets:Salesforce/wikitext:wikitext-2-raw-v1:train"
        raise ConfigError("not the name of a data set", where=text, why=why)
    identity, config, split = [*parts, "", ""][:3]
    return DatasetName(identity, config or None, split or "train")


def text_rows(data: str, tokenizer: PreTrainedTokenizerBase, tokens: int, sequence_length: int, seed: int) -> TokenRows:
    """`tokens // sequence_length` packed rows of `data`; fewer where there is less text.

    Raises:
        ConfigError: no such file, recipe or data set, or too little text.
        InputRejected: unreadable text, or a failing chat template.
        EnvironmentProblem: the `datasets` library is not installed.
    """
    if is_saved_dataset(Path(data).expanduser()):
        data = PREFIX + data
    if data.startswith(PREFIX):
        return document_rows(dataset_documents(dataset_name(data), seed), data, tokenizer, tokens, sequence_length)
    recipe = load_recipe(DEFAULT if data == CALIBRATION else data)
    return calibration_rows(recipe, tokenizer, tokens, sequence_length, seed)


def dataset_documents(name: DatasetName, seed: int) -> Iterator[Document]:
    """The documents of a data set, shuffled by `seed`; rows without text are left out.

    Raises:
        ConfigError: the library cannot find it, or its config or split.
        InputRejected: a row has none of the columns.
    """
    rows = iter(_load(name).shuffle(seed=seed, buffer_size=SHUFFLE_ROWS))
    for number, row in enumerate(_read(rows, name)):
        document = document_of(row, f"{name.id}, row {number}")
        if document.content:
            yield document


def _load(name: DatasetName) -> Any:
    try:
        import datasets
    except ImportError as error:
        command = "pip install datasets"
        raise EnvironmentProblem("the library 'datasets' is not installed", next_command=command) from error
    if is_saved_dataset(Path(name.id).expanduser()):
        return _load_saved(name)
    streaming = not datasets.config.HF_DATASETS_OFFLINE or name.id.startswith((".", "/", "~"))
    try:
        loaded = datasets.load_dataset(name.id, name.config, split=name.split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # not there, no network, unknown split
        raise ConfigError("the data set cannot be loaded", where=":".join(map(str, name)), why=str(error)) from error
    return loaded if streaming else loaded.to_iterable_dataset()


def _load_saved(name: DatasetName) -> Any:
    """What `save_to_disk` wrote: one data set, or a dictionary of splits."""
    import datasets

    folder = Path(name.id).expanduser()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise InputRejected("the saved data set cannot be read", where=str(folder), why=str(error)) from error
    if isinstance(loaded, datasets.DatasetDict):
        if name.split not in loaded:
            command = f"{PREFIX}{name.id}::{next(iter(loaded), 'SPLIT')}"
            why = f"no split '{name.split}', it has {', '.join(loaded)}"
            raise ConfigError("the data set cannot be loaded", where=name.id, why=why, next_command=command)
        loaded = loaded[name.split]
    return loaded.to_iterable_dataset()


def _read(rows: Iterator[dict[str, Any]], name: DatasetName) -> Iterator[dict[str, Any]]:
    """The rows one by one; what the network or a file does meanwhile is named."""
    while True:
        try:
            row = list(islice(rows, 1))
        except (OSError, ValueError) as error:
            raise InputRejected("the data set cannot be read", where=name.id, why=str(error)) from error
        if not row:
            return
        yield row[0]
