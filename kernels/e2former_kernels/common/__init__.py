"""Pieces shared by the operations: harmonics, radial network, envelope, evaluation in runs, argument checks."""
