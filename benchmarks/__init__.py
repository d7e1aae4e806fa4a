"""Measurements of this machine."""

import mirepro  # noqa: F401  # before torch: comparisons are not held to the portable tier's variables
