"""Exact reproduction of mutual-information contrastive representation learning (arXiv:2005.13149)."""
