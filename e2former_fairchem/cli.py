"""The `e2former-fairchem` command by its earlier path; the command itself is the module `e2former_fairchem_cli`."""

from __future__ import annotations

import sys

from e2former_fairchem_cli import COMMANDS, main

__all__ = ["COMMANDS", "main"]

if __name__ == "__main__":
    sys.exit(main())
