"""Checks of a potential-energy surface, for any fairchem checkpoint.

| module | concept |
|---|---|
| `nve` | drift of the total energy in molecular dynamics at constant energy |
| `bond_scan` | a bond stretched: extra minima and maxima, jumps, and forces against energies |
| `forces` | forces against finite differences of the energy; net force and torque |
| `extensivity` | n copies far apart, or a supercell, have n times the energy |
| `reflection` | mirror images and rotated copies have the same energy |
| `cutoff` | an atom pulled through the cutoff: jumps of energy and forces |
| `potential`, `systems`, `settings` | the model; test systems; what the YAML sets |
| `curves` | jumps and extrema of functions of one variable |
| `run`, `result`, `table`, `plot` | all checks of a run; their outcome; as a table; as a figure |

A check is a settings class (a frozen dataclass with `systems`, parameters and thresholds) and a function
`check(potential, name, atoms, settings, rng) -> Outcome` for one system. `run.CHECKS` lists them.
"""
