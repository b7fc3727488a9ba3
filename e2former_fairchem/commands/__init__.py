"""Subcommands of ``e2former-fairchem``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""
