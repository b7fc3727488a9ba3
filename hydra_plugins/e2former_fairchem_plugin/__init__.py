"""Makes this package known to the fairchem command line; for every other Hydra application it does nothing.

Hydra imports all modules of the namespace package `hydra_plugins` in every Hydra application of an environment, and
calls each search-path plugin whenever a configuration is composed. So nothing but Hydra's own interface is imported
here, and the plugin acts only when the composing process has fairchem loaded.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

PROVIDER = "e2former-fairchem"
CONFIG_PATH = "pkg://e2former_fairchem.configs"


class E2FormerSearchPathPlugin(SearchPathPlugin):
    """Adds the groups `backbone/` and `heads/`, the short names and the `e2former.*` resolvers to a fairchem run.

    Our own run files find the groups beside them (`dataset/`, `job/`, ...) from each of their folders.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our groups after the application's own, so that a group of the same name there keeps its options."""
        if "fairchem.core" not in sys.modules:
            return
        try:
            from e2former_fairchem import mistakes  # importing the package registers the short names
            from e2former_fairchem.training.resolvers import register_resolvers
        except Exception as err:  # an environment's other fairchem runs must not die of this package
            warnings.warn(
                f"e2former-fairchem is installed but cannot be imported, so its names and config groups are missing "
                f"in this run: {type(err).__name__}: {err}",
                stacklevel=2,
            )
            return
        main = next((e.path for e in search_path.get_path() if e.provider == "main"), None)
        folder = Path(main.removeprefix("file://")) if main and "pkg://" not in main else None
        register_resolvers(folder)
        mistakes.in_command(folder)
        if folder is not None and folder.resolve().is_relative_to(mistakes.RUN_FILES.resolve()):
            search_path.append(PROVIDER, f"file://{mistakes.RUN_FILES}")
        search_path.append(PROVIDER, CONFIG_PATH)
