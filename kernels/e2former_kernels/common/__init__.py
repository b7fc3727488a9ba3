"""Pieces shared by the operations: harmonics, radial network, envelope, chunked evaluation, argument checks."""
