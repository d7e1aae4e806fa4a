"""`python -m mirepro`."""

from mirepro.cli import main

main()
