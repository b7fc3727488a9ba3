"""What is simulated: ensemble, temperature, time step."""

from __future__ import annotations

from dataclasses import dataclass

ENSEMBLES = ("nve", "nvt", "npt")

#: eV/Å³ in a bar and in a GPa.
BAR = 6.241509074e-7
GPA = 1e4 * BAR


@dataclass(frozen=True)
class Settings:
    """What decides a trajectory besides structure and checkpoint.

    Attributes:
        ensemble: `nve` (velocity Verlet), `nvt` (Langevin), or `npt` (Martyna, Tobias and Klein, isotropic).
        temperature: K, of the thermostat, and of starting velocities where the structure has none.
        timestep: fs.
        pressure: bar, of the barostat.
        thermostat_time: fs; the friction of `nvt` is its inverse.
        barostat_time: fs.
        seed: of starting velocities and of the thermostat's noise.
    """

    ensemble: str = "nve"
    temperature: float = 300.0
    timestep: float = 0.5
    pressure: float = 1.0
    thermostat_time: float = 100.0
    barostat_time: float = 1000.0
    seed: int = 0
