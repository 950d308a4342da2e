"""TensorBoard events of a training stage, where they are asked for and the package `tensorboard` is installed."""

from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from moe_edge.contracts.errors import EnvironmentProblem


def require_tensorboard() -> None:
    """Raises EnvironmentProblem where the package is missing."""
    if find_spec("tensorboard") is None:
        raise EnvironmentProblem(
            "TensorBoard events were asked for, and tensorboard is not installed",
            where="distill.tensorboard",
            next_command="pip install 'moe-edge[tensorboard]'",
        )


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Writes what the Trainer logs as events below `folder`; raises as `require_tensorboard`."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder)))
