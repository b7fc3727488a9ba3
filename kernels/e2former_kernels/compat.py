"""Private names of torch that the kernels use, all in one place: another version may change them without a word.

Each stands in :data:`PRIVATE_NAMES` with the reason and with what breaks when it is gone; a test holds them to that.
Everything else imports them from here.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

__all__ = [
    "PRIVATE_NAMES",
    "TESTED_TORCH",
    "PrivateName",
    "end_workers",
    "foreach_copy_",
    "is_fake",
    "missing",
    "will_engine_execute_node",
    "with_autograd",
]

#: Versions of torch that the tests have run with: on GPUs, on CPUs.
TESTED_TORCH = ("2.11", "2.13")


class PrivateName(NamedTuple):
    """A name without a promise.

    path: ``module:name``, with dots after the colon for what lies in a class or a module without a file.
    why: what it is used for, and why nothing public serves. breaks: what no longer works without it.
    parameters: of a function, as its signature has them; None where it has none that can be read.
    """

    path: str
    why: str
    breaks: str
    parameters: tuple[str, ...] | None = None

    def get(self) -> Any:
        """The object; raises ImportError when its library no longer has it."""
        module, _, name = self.path.partition(":")
        try:
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (AttributeError, ModuleNotFoundError) as err:
            if isinstance(err, ModuleNotFoundError) and not f"{module}.".startswith(f"{err.name}."):
                raise  # the module is there; a package that it needs is not
            raise ImportError(f"{self.path} is gone ({err}), without which {self.breaks} breaks: {self.why}") from err
        return found


PRIVATE_NAMES = (
    PrivateName(
        "torch:_C._will_engine_execute_node",
        "`needs_input_grad` is true for every weight that requires gradients, also while forces alone are asked for",
        "choosing the derivatives to compute (common/call.py, registered.py)",
    ),
    *(
        PrivateName(
            f"torch:_C.{name}",
            "the dispatcher excludes autograd in bodies of operations, where a derivative would silently be zero",
            "every operation under torch.compile (common/registered.py)",
        )
        for name in (
            "_dispatch_tls_local_include_set",
            "_dispatch_tls_local_exclude_set",
            "_ForceDispatchKeyGuard",
            "DispatchKeySet",
            "DispatchKey.ADInplaceOrView",
            "DispatchKey.AutogradFunctionality",
        )
    ),
    PrivateName(
        "torch._subclasses.fake_tensor:is_fake",
        "while a graph is traced the engine runs nothing, so all gradients count as asked for",
        "every operation under torch.compile (common/registered.py)",
        ("x",),
    ),
    PrivateName(
        "torch:_foreach_copy_",
        "one launch copies a list of tensors; torch's optimisers use it, no public name does the same",
        "replay of CUDA graphs (e2former_fairchem/captured.py, training/replay.py)",
    ),
    PrivateName(
        "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._shutdown_workers",
        "workers that stay are told to end when their iterator (`DataLoader._iterator`) is collected; where the "
        "interpreter ends first, it waits five seconds for each of them",
        "the end of training runs with workers (e2former_fairchem/training/runner.py)",
        ("self",),
    ),
)


def missing() -> list[PrivateName]:
    """Those of PRIVATE_NAMES that the installed torch does not have."""
    found = []
    for name in PRIVATE_NAMES:
        try:
            name.get()
        except ImportError:
            found.append(name)
    return found


_NAMES = {name.path: name for name in PRIVATE_NAMES}

will_engine_execute_node = _NAMES["torch:_C._will_engine_execute_node"].get()
is_fake = _NAMES["torch._subclasses.fake_tensor:is_fake"].get()
foreach_copy_ = _NAMES["torch:_foreach_copy_"].get()


def with_autograd() -> contextlib.AbstractContextManager:
    """Inside the body of a registered operation: autograd works, where the dispatcher has excluded it."""
    keys = torch._C.DispatchKey
    autograd = torch._C.DispatchKeySet(keys.AutogradFunctionality) | torch._C.DispatchKeySet(keys.ADInplaceOrView)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - autograd)


def end_workers(loader: DataLoader) -> None:
    """End the processes that a loader keeps; its next iteration starts others."""
    if loader.num_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
