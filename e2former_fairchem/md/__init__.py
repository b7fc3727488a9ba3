"""Molecular dynamics with any fairchem checkpoint: `fairchem -c configs/md.yaml`, `e2former_fairchem.runners.md`.

| module | what |
|---|---|
| `settings` | what is simulated |
| `engine` | what an engine does, and when a run stops |
| `ase_engine` | ASE's integrators |
| `nvalchemi_engine` | nvalchemi-toolkit's, with everything on the GPU |
| `record` | the files of a run, which a killed run continues |
| `run` | the loop |
| `plot` | energies, temperature and pressure over time |
"""
