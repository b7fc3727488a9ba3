"""Reference and Triton implementations of E2Former-V2's edge operations (arXiv:2601.16622).

Every operation lives in a folder of its own: ``reference.py`` is plain PyTorch and defines the function,
the kernels beside it are held to it. Nothing here knows about fairchem.
"""
