"""`fairchem -c` within a process, without its notes and with errors of one line; the run files that come with us."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fairchem.core.common import distutils

from e2former_fairchem.compat import fairchem_main
from e2former_fairchem.mistakes import RUN_FILES, describe

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


#: What fairchem says as a warning of every prediction unit: its settings, and that it is no UMA.
_NO_NEWS = ("with inference settings", "UMA Nitro cannot serve", "Now running with nitro=False")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _NO_NEWS)


def without_notes(level: int | str) -> None:
    """From now on, nothing below this level, none of fairchem's warnings that are no news, and none of torch's own."""
    warnings.filterwarnings("ignore", module=r"(torch|torchtnt|fairchem)\.")
    root = logging.getLogger()
    root.setLevel(level)
    root.addFilter(_is_news)


@contextmanager
def quietly() -> Iterator[None]:
    """Without fairchem's notes (ten kilobytes of configuration among them) and torch's warnings of its own doings.

    The environment's LOGLEVEL, which fairchem reads, takes precedence.
    """
    root, level, environment = logging.getLogger(), logging.getLogger().level, os.environ.get("LOGLEVEL")
    os.environ.setdefault("LOGLEVEL", "WARNING")
    try:
        with warnings.catch_warnings():
            without_notes(os.environ["LOGLEVEL"].upper())
            yield
    finally:
        root.removeFilter(_is_news)
        root.setLevel(level)
        if environment is None:
            os.environ.pop("LOGLEVEL", None)


def launch(config: Path, overrides: Sequence[str] = ()) -> None:
    """`fairchem -c CONFIG OVERRIDES` in this process; signals are handled as before afterwards.

    Raises:
        ValueError: a mistake in the config or in what it names, in one line (`e2former_fairchem.mistakes`).
    """
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD) if in_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        fairchem_main(config, overrides)
    except Exception as err:
        said = describe(err, config, overrides)
        if said is None:
            raise
        raise ValueError(said) from err
    finally:
        if distutils.initialized():
            distutils.cleanup()
        for number, handler in handlers.items():
            signal.signal(number, handler)
