"""A user's mistakes in a run, in one line each: from `launch`, and from fairchem's own command with our run files."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

PACKAGE = Path(__file__).parent
#: A clone's `configs` is a link to it.
RUN_FILES = PACKAGE / "run_files"
_NEAREST = 3
#: Hydra and OmegaConf on a key that is not there, fairchem on one that nothing reads.
_UNKNOWN_KEY = (
    re.compile(r"Could not override '([^']+)'"),
    re.compile(r"Could not delete from config\. '([^']+)' does not exist"),
    re.compile(r"Found unused keys in the config: \{'([^']+)'"),
)


def describe(error: BaseException, config: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """One line on a mistake in a run's file, its overrides or what they name; None where the error is of another kind.

    Mistakes are what YAML, Hydra and OmegaConf refuse, what this package refuses, and files that cannot be read.

    Args:
        error: what `fairchem -c CONFIG OVERRIDES` raised.
        config: the run's file.
        overrides: as they were given.
    """
    config = Path(config)
    if not config.is_file():
        known = [one.relative_to(RUN_FILES).with_suffix("").as_posix() for one in RUN_FILES.rglob("*.yaml")]
        near = difflib.get_close_matches(config.stem, known, 1)
        hint = f"; did you mean {config.with_stem(near[0])}?" if near else ""
        return f"-c: expected a run file, got {config}, which does not exist{hint}"
    cause = error
    while cause.__cause__ is not None and isinstance(cause, HydraException | OmegaConfBaseException):
        if isinstance(cause, ConfigCompositionException):
            break
        cause = cause.__cause__
    said = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(cause).partition("Config search path")[0])
    for pattern in _UNKNOWN_KEY:
        if found := pattern.search(said):
            return _unknown_key(found[1], config, overrides)
    of_config = isinstance(cause, HydraException | OmegaConfBaseException | YAMLError | OSError)
    of_ours = isinstance(cause, ValueError | TypeError | ImportError) and _raised_here(cause)
    return " ".join(said.split()) if of_config or of_ours else None


def _raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` of this package is its origin, or an import that it lacks; an error of Python's is a bug."""
    places = traceback.extract_tb(error.__traceback__)
    if not places or not Path(places[-1].filename).is_relative_to(PACKAGE):
        return False
    return isinstance(error, ImportError) or (places[-1].line or "").startswith("raise")


def _unknown_key(key: str, config: Path, overrides: Sequence[str]) -> str:
    """Name the run's file and the keys of it that were probably meant."""
    known = list(_keys(_composed(config, [one for one in overrides if _key_of(one) != key])))
    last = _last(key)
    beside = [one for one in known if one.removesuffix(_last(one)) == key.removesuffix(last)]
    near = _closest(last, beside) or [one for one in known if _last(one) == last] or _closest(last, known)
    hint = f"did you mean {' or '.join(near[:_NEAREST])}?" if near else f"expected {', '.join(sorted(beside or known))}"
    return f"{key}: no key of {config}; {hint}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _closest(last: str, keys: Sequence[str]) -> list[str]:
    """Those of the keys whose last parts resemble this one, the closest first."""
    names = difflib.get_close_matches(last, {_last(one) for one in keys}, _NEAREST, 0.7)
    return [one for name in names for one in keys if _last(one) == name]


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _composed(config: Path, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of the run's file, with nothing of it evaluated; empty where it cannot."""
    try:
        with hydra.initialize_config_dir(str(config.absolute().parent), version_base="1.3"):
            return hydra.compose(config_name=config.name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException):  # another mistake beside this one
        return OmegaConf.create()


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All keys with dots; of what a `_target_` takes, too."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                yield from _keys(value, f"{prefix}{key}.")


def in_command(folder: Path | None) -> None:
    """In fairchem's own command: mistakes in one line, and fairchem's notes left out.

    Where the run's file is ours or names this package, as those of `e2former-fairchem train` and of checkpoints do;
    mistakes also where an override names it. LOGLEVEL in the environment, which fairchem reads, brings the notes back,
    and LOGLEVEL=DEBUG tracebacks. Runs on a cluster keep their notes: logs are for later.

    Args:
        folder: of the run's file.
    """
    if Path(sys.argv[0]).name != "fairchem" or sys.excepthook.__module__ == __name__:
        return
    words = sys.argv[1:]
    place = next((n for n, word in enumerate(words) if word in ("-c", "--config")), None)
    if place is None or place + 1 >= len(words):
        return
    config, overrides = Path(words[place + 1]), words[:place] + words[place + 2 :]
    text = config.read_text() if config.is_file() else ""
    ours = PACKAGE.name in text or (folder is not None and folder.resolve().is_relative_to(RUN_FILES.resolve()))
    named = ours or not text or any("e2former" in word for word in overrides)
    level, before = os.environ.get("LOGLEVEL", ""), sys.excepthook
    if ours and not level and not any("slurm" in word.lower() for word in overrides) and "mode: SLURM" not in text:
        from e2former_fairchem.launch import without_notes

        os.environ["LOGLEVEL"] = "WARNING"  # fairchem sets its level once more
        without_notes(logging.WARNING)

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = describe(error, config, overrides) if named and level.upper() != "DEBUG" else None
        if said is None:
            before(kind, error, trace)
        else:  # past torch's hook, which puts the rank before every line
            print(f"fairchem: {said}", file=sys.__stderr__, flush=True)

    say.__module__ = __name__
    sys.excepthook = say
