"""OMol25's leaderboard: S2EF and the seven evaluation tasks from any fairchem checkpoint, and checks before the upload.

| module | concept |
|---|---|
| `journal` | results on disk, record by record, so that a killed run goes on where it stopped |
| `predictor` | energies and forces of batches; one bad structure fails alone |
| `runner` | one worker's share of the structures: journal, progress, provenance |
| `s2ef`, `s2ef_merge` | structure to energy and forces: prediction, and merging with scores |
| `tasks`, `relax`, `evaluate`, `evaluate_merge` | the seven tasks |
| `check_submission`, `check_s2ef`, `check_task`, `report` | `e2former-fairchem check-submission` |
| `provenance`, `recipes` | what a result was made from; fairchem's recipes |
"""
