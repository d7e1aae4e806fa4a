"""Runs a command beside a Slurm of its own: `python -m tests.with_slurm mirepro repro --jobs 2` (root; docs/slurm.md).

Two nodes on this machine, ended with the command; MIREPRO_LAUNCH is `slurm` unless it is set.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster import Cluster, missing


def main(words: list[str]) -> int:
    """Exit code of the command."""
    if not words or (lacking := missing()):
        reason = f"needs {', '.join(lacking)} (apt-get install slurm-wlm munge)" if words else "name a command"
        print(f"with_slurm: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "slurm")
        try:
            cluster.start()
            environment = {"MIREPRO_LAUNCH": "slurm"} | os.environ | cluster.environment
            return subprocess.run(words, env=environment, check=False).returncode
        finally:
            cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
