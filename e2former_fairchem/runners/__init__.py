"""Runners for the `fairchem` command line.

| module | runner |
|---|---|
| `pes` | checks of a potential-energy surface (`e2former_fairchem.pes`) for any checkpoint |
| `md` | molecular dynamics (`e2former_fairchem.md`) for any checkpoint |
| `crystals` | phonons and elastic constants with fairchem's runners |
| `benchmarks` | fairchem's benchmarks of inference and of training |
"""
