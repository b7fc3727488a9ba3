"""Radial networks of the distance and two elements (docs/network.md, section 3.3)."""
