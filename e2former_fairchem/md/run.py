"""The loop of a run: steps, lines, frames, and places to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from e2former_fairchem.md.engine import Engine, Observables
from e2former_fairchem.md.record import Record, read_log

#: Seconds between two lines of progress.
_PROGRESS = 10.0


@dataclass(frozen=True)
class Intervals:
    """Steps between two lines of the log, two frames, and two restart files."""

    log: int
    save: int
    restart: int


def run(
    engine: Engine,
    record: Record,
    steps: int,
    timestep: float,
    intervals: Intervals,
    stop: Callable[[], Any],
    say: Callable[[str], None],
) -> Any:
    """Integrate from where the engine stands.

    Args:
        engine: what integrates.
        record: what writes.
        steps: where to end.
        timestep: fs.
        intervals: see there.
        stop: asked now and then; what it returns ends the run if it is true, and comes back.
        say: prints a line.

    Returns:
        What `stop` returned.

    Raises:
        BlownUp: see `engine.Engine.advance`; the files have all until then.
    """
    start, first, said = time.monotonic(), engine.steps, -np.inf
    at, before = start, first

    def note() -> None:
        nonlocal at, before, said
        done, now, frame = engine.steps, time.monotonic(), None
        picoseconds = done * timestep / 1000
        if done % intervals.log == 0 or done == steps:
            frame = engine.frame()
            seen = Observables.of(frame)
            speed = (done - before) * timestep * 1e-6 * 86400 / (now - at) if done > before else None
            record.log(done, picoseconds, seen, speed)
            at, before = now, done
            if now - said > _PROGRESS or done == steps:
                said = now
                left = "" if done == first else f", {_duration((now - start) / (done - first) * (steps - done))} left"
                say(
                    f"step {done}/{steps}, {picoseconds:.6g} ps: {seen.temperature:.1f} K, potential "
                    f"{seen.potential_energy:.4f} eV, total {seen.total_energy:.4f} eV"
                    + ("" if seen.pressure is None else f", {seen.pressure:.3f} GPa")
                    + ("" if speed is None else f", {speed:.3g} ns/day")
                    + left
                )
        if done % intervals.save == 0 or done == steps:
            record.save(done, picoseconds, engine.frame() if frame is None else frame)
        if done % intervals.restart == 0 or done == steps:
            record.mark(done, engine.state())

    if engine.steps == 0:
        note()
    stride = gcd(intervals.log, intervals.save, intervals.restart)
    while engine.steps < steps:
        engine.advance(min(stride - engine.steps % stride, steps - engine.steps))
        note()
        if engine.steps < steps and (reason := stop()):
            record.mark(engine.steps, engine.state())
            return reason
    return None


def summarize(record: Record, atoms: int, ensemble: str) -> dict[str, Any]:
    """Numbers of a run, from its log: means of its latter part, speed, and for `nve` the drift of the total energy."""
    columns = read_log(record.folder)
    half = columns["time"] >= columns["time"][-1] / 2
    found: dict[str, Any] = {
        "steps": int(columns["step"][-1]),
        "time_ps": float(columns["time"][-1]),
        "mean_temperature_K": float(columns["temperature"][half].mean()),
        "median_ns_per_day": None,
    }
    speed = columns["ns_per_day"][np.isfinite(columns["ns_per_day"])]
    if len(speed):
        found["median_ns_per_day"] = float(np.median(speed))
    if np.isfinite(columns["pressure"]).all():
        found["mean_pressure_GPa"] = float(columns["pressure"][half].mean())
    if ensemble == "nve" and half.sum() > 2:
        slope = np.polyfit(columns["time"][half], columns["total_energy"][half], 1)[0]
        found["drift_meV_per_atom_per_ps"] = float(1000 * slope / atoms)
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
