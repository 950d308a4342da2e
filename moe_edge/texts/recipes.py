"""Calibration recipes: which text the teacher reads, from where, under which licence.

A recipe is a YAML file beside its text files. A path to a file of rows or to any other text (documents.py) stands for a recipe
with that one source.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import read_yaml, validate_document
from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.manifest import MANIFEST_NAME
from moe_edge.storage.files import sha256_file

DEFAULT = "default"
SAVED_DATASET = ("state.json", "dataset_dict.json")
_CLOSED = ConfigDict(extra="forbid", frozen=True)


class Credit(BaseModel):
    """A text file with where it comes from."""

    model_config = _CLOSED
    path: str = Field(description="file, relative to the recipe")
    source: str = Field(description="title, author and address of the text")
    licence: str = Field(description="SPDX identifier")


class Source(Credit):
    """A text file that calibration rows are made of."""

    share: float = Field(1.0, gt=0, description="part of the tokens, relative to the other sources' shares")


class Recipe(BaseModel):
    """Text sources and how much of each."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/recipe@1"] = Field("moe-edge/recipe@1", alias="schema")
    description: str = ""
    sources: list[Source] = Field(min_length=1)
    heldout: Credit | None = Field(None, description="text that is never calibrated on, the default judge of artifacts")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the folder to which its paths are relative."""

    name: str
    recipe: Recipe
    folder: Path

    def files(self) -> list[Path]:
        """Every file that the recipe names, for keys and digests."""
        credits: list[Credit] = list(self.recipe.sources)
        credits += [self.recipe.heldout] if self.recipe.heldout else []
        return [self.folder / credit.path for credit in credits]


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """A shipped recipe by name, a .yaml recipe by path, or any text file as a recipe of one source.

    Raises:
        ConfigError: no such recipe or file, or a wrong key with its line.
    """
    shipped = data_root("calibration")
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if path.is_file():
            source = Source(path=path.name, source=str(path.name), licence="unknown")
            return LoadedRecipe(path.name, Recipe(sources=[source]), path.parent)
        path = shipped / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in shipped.glob("*.yaml")))
            raise ConfigError(
                f"no calibration recipe or file '{name_or_path}'",
                where="calibration.recipe",
                why=f"shipped recipes: {known}; or give the path of a .yaml recipe, a .jsonl, .json or a text file",
            )
    return LoadedRecipe(path.stem, validate_document(Recipe, read_yaml(path)), path.parent)


def heldout_file(text: str) -> Path:
    """The held-out text: `default` is the default recipe's split, everything else a path.

    Raises:
        ConfigError: no such file.
    """
    if text != DEFAULT:
        return Path(text).expanduser()
    loaded = load_recipe(DEFAULT)
    if loaded.recipe.heldout is None:
        raise ConfigError("the default recipe has no held-out text", where=str(loaded.folder))
    return loaded.folder / loaded.recipe.heldout.path


def named_files(config: BuildConfig) -> dict[str, dict[str, str]]:
    """Per stage the digests of the texts that its settings name, so that editing one is noticed."""
    recipe = load_recipe(config.calibration.recipe)
    calibration = {source.path: sha256_file(recipe.folder / source.path) for source in recipe.recipe.sources}
    heldout = heldout_file(config.validate_.text)
    if not heldout.is_file():
        raise ConfigError("no such text file", where=f"validate.text: {heldout}")
    earlier = Path(config.plan.within) if config.plan.within else None
    return {
        "profile": calibration,
        "plan": {earlier.name: sha256_file(earlier)} if earlier else {},
        "distill": data_digests(config.distill.data),
        "validate": {heldout.name: sha256_file(heldout)},
    }


def is_saved_dataset(folder: Path) -> bool:
    """Did the `datasets` library's `save_to_disk` write this folder?"""
    return any((folder / name).is_file() for name in SAVED_DATASET)


def data_digests(data: str) -> dict[str, str]:
    """Of the files that `distill.data` names: a text, a recipe and its texts, the states of a saved data set, which hold the
    fingerprints of its contents, or the manifest of a capture."""
    path = Path(data).expanduser()
    if is_saved_dataset(path):
        return {file.relative_to(path).as_posix(): sha256_file(file) for file in sorted(path.rglob("state.json"))}
    if path.is_file():
        return {str(file): sha256_file(file) for file in (path, *load_recipe(data).files())}
    manifest = path / MANIFEST_NAME
    return {"capture": sha256_file(manifest)} if manifest.is_file() else {}
