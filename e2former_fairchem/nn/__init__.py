"""Layers of E2Former-V2. Parameters and node-wise arithmetic live here, edge operations in ``e2former_kernels``."""
