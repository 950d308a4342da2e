"""Where the data that ships with moe-edge lies (`targets/`, `calibration/`), in a checkout and in a wheel alike.

In a checkout (or an editable install) the folders stand at the repository's top, beside the package; a wheel
carries them as `moe_edge/_data/<name>`. Everyone who reads shipped data asks here, so that both installs find the
same files.
"""

from pathlib import Path

from moe_edge.contracts.errors import EnvironmentProblem

_PACKAGE = Path(__file__).resolve().parent.parent


def data_root(name: str) -> Path:
    """The folder of the shipped data set `name` ("targets" or "calibration").

    Raises:
        EnvironmentProblem: the installation is incomplete and has no such folder.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise EnvironmentProblem(
        f"the shipped data '{name}' is missing",
        where=str(_PACKAGE / "_data" / name),
        why="the package was installed incompletely",
        next_command="pip install --force-reinstall moe-edge",
    )
