"""Compile every kernel that a test session launches for an H100, on a machine without a GPU.

    PYTHONPATH=kernels/benchmarks TRITON_INTERPRET=1 pytest -p compile_kernels --kernels /tmp/kernels tests/ops
    python kernels/benchmarks/compile_kernels.py /tmp/kernels [--each 2] [--arch 90]

Triton's interpreter takes Python that its compiler refuses. The first command, a pytest plugin, writes down with which
types and constants the interpreted kernels were launched; the other compiles them to machine code, ``each`` of every
kernel's launches, and names those that fail. float64, which only tests use, is compiled as float32.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

OPTIONS = ("num_warps", "num_stages")
_launches: set[str] = set()


def pytest_addoption(parser) -> None:
    """The folder that launches are written to, one file a process."""
    parser.addoption("--kernels", type=Path, required=True)


def pytest_configure(config) -> None:
    """Write down every launch from now on."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def run(self, *args, **kwargs):
        _launches.add(_described(self.fn, args, kwargs))
        return plain(self, *args, **kwargs)

    InterpretedFunction.run = run


def pytest_unconfigure(config) -> None:
    """The file of this process."""
    folder = config.getoption("--kernels")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.jsonl").write_text("".join(f"{line}\n" for line in sorted(_launches)))


def _described(function, args: tuple, kwargs: dict) -> str:
    """Module, name, types, constants and options of a launch, as JSON."""
    import torch
    from triton.runtime.jit import type_canonicalisation_dict as names

    parameters = inspect.signature(function).parameters
    bound = inspect.signature(function).bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
    bound.apply_defaults()
    types, constants = {}, {}
    for name, value in bound.arguments.items():
        value = getattr(value, "value", value)
        if value is None or "constexpr" in str(parameters[name].annotation):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.").replace("float64", "float32")
            types[name] = f"*{names[dtype]}"
        else:
            types[name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
    options = {key: kwargs[key] for key in OPTIONS if key in kwargs and key not in parameters}
    return json.dumps([function.__module__, function.__qualname__, types, constants, options], sort_keys=False)


def main() -> None:
    """Compile what was written down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--arch", type=int, default=90)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET: expected none, the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = defaultdict(list)
    for line in sorted({line for file in options.folder.glob("*.jsonl") for line in file.read_text().splitlines()}):
        module, name, *launch = json.loads(line)
        launches[module, name].append(launch)
    if not launches:
        parser.error(f"{options.folder}: expected files of launches, got none")
    failures, start = 0, time.monotonic()
    for (module, name), found in sorted(launches.items()):
        function = getattr(importlib.import_module(module), name)
        for types, constants, chosen in found[:: max(len(found) // options.each, 1)][: options.each]:
            places = {(list(types).index(key),): value for key, value in constants.items()}
            try:
                source = ASTSource(fn=function, signature=types, constexprs=places)
                triton.compile(source, target=GPUTarget("cuda", options.arch, 32), options={"num_warps": 4} | chosen)
            except Exception as error:  # whatever the compiler raises
                failures += 1
                print(f"{module}.{name} {constants}: {error}", file=sys.stderr)
    print(
        f"{len(launches)} kernels, {failures} failures, {time.monotonic() - start:.0f} s, Triton {triton.__version__}"
    )
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
