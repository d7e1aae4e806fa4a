"""Exact reproduction of mutual-information contrastive representation learning (arXiv:2005.13149)."""

import sys

if "torch" in sys.modules:  # too late to set torch's environment: at least say so where it is wrong
    from mirepro import determinism

    determinism.guard()
