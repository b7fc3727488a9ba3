"""`fairchem -c` within a process, without its notes and with errors of one line; the run files that come with us."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fairchem.core.common import distutils
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf.errors import OmegaConfBaseException

from e2former_fairchem.compat import fairchem_main

#: A clone's `configs` is a link to it.
RUN_FILES = Path(__file__).parent / "run_files"
#: Folders of choices, which are no runs.
_GROUPS = {"dataset", "evaluation", "job", "model", "tasks"}


def run_files() -> dict[str, Path]:
    """The run files by name: their path in the folder, without the suffix."""
    found = ((path.relative_to(RUN_FILES).with_suffix(""), path) for path in sorted(RUN_FILES.rglob("*.yaml")))
    return {name.as_posix(): path for name, path in found if not _GROUPS & set(name.parts)}


def find(name: str) -> Path:
    """A run file by its name, or any other by its path.

    Raises:
        ValueError: neither.
    """
    known = run_files()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"expected a file or one of {', '.join(known)}, got {name}")


def _is_news(record: logging.LogRecord) -> bool:
    """fairchem says the settings of every prediction unit as a warning."""
    return "with inference settings" not in record.getMessage()


@contextmanager
def quietly() -> Iterator[None]:
    """Without fairchem's notes (ten kilobytes of configuration among them) and torch's warnings of its own doings.

    The environment's LOGLEVEL, which fairchem reads, takes precedence.
    """
    root, level, environment = logging.getLogger(), logging.getLogger().level, os.environ.get("LOGLEVEL")
    os.environ.setdefault("LOGLEVEL", "WARNING")
    root.setLevel(os.environ["LOGLEVEL"].upper())
    root.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|torchtnt|fairchem)\.")
            yield
    finally:
        root.removeFilter(_is_news)
        root.setLevel(level)
        if environment is None:
            os.environ.pop("LOGLEVEL", None)


def launch(config: Path, overrides: Sequence[str] = ()) -> None:
    """`fairchem -c CONFIG OVERRIDES` in this process; signals are handled as before afterwards.

    Raises:
        ValueError: what Hydra and OmegaConf found wrong with the config, in one line.
    """
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD) if in_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        fairchem_main(config, overrides)
    except (HydraException, OmegaConfBaseException) as err:
        cause: BaseException = err
        while cause.__cause__ is not None and not isinstance(cause, ConfigCompositionException):
            cause = cause.__cause__
        said = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(cause).partition("Config search path")[0])
        raise ValueError(" ".join(said.split())) from err
    finally:
        if distutils.initialized():
            distutils.cleanup()
        for number, handler in handlers.items():
            signal.signal(number, handler)
