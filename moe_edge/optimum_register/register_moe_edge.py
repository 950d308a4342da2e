"""`optimum-cli export moe-edge --model M --target T OUT`: moe-edge's export inside Hugging Face Optimum's command line.

Optimum finds subcommands in the namespace package `optimum.commands.register`, so this folder is installed under that name
(pyproject.toml) and must not have an __init__.py. Everything of moe-edge is imported when the command runs, because
optimum-cli imports this file at every start.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MoeEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """Hands its arguments to `moe-edge export`; the exit codes are the same."""

    COMMAND = CommandInfo(
        name="moe-edge", help="Export a Mixture-of-Experts checkpoint to GGUF and ONNX for an edge device (moe-edge)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="checkpoint folder or hub id")
        parser.add_argument(
            "--target", default="cpu", help="a shipped target (moe-edge targets list), or a target .yaml"
        )
        parser.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override one key, e.g. --set export.formats=[gguf]",
        )
        parser.add_argument("--json", action="store_true", help="only JSON on stdout")
        parser.add_argument("output", help="output folder; the models are in OUTPUT/artifacts")

    def run(self) -> None:
        from moe_edge.cli.main import main

        given = self.args
        settings = [word for setting in given.settings for word in ("--set", setting)]
        wanted = ["export", given.model, "--target", given.target, "--out", given.output, *settings]
        sys.argv[0] = "moe-edge"  # messages of the command line name their program
        main([*wanted, *(["--json"] if given.json else [])])


REGISTER_COMMANDS = [(MoeEdgeExportCommand, ExportCommand)]
