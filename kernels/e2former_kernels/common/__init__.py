"""Pieces shared by the operations: harmonics, envelope, evaluation in chunks, float16 rows, argument checks."""
