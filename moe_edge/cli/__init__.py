"""The command line: one file per group of commands; `main` is the entry point."""
