"""Pieces shared by the operations: harmonics, envelope, evaluation in runs, float16 rows, argument checks."""
