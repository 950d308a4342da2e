"""`python -m moe_edge`: the same as the `moe-edge` command."""

from moe_edge.cli.main import main

if __name__ == "__main__":
    main()
