"""A real Slurm on this machine: munge, slurmctld, two slurmd, and slurmdbd with MariaDB where accounts are wanted.

Runs as root without systemd; everything is stopped by its pid file.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mirepro.launch.slurm import TRANSIENT

TOOLS = ("munged", "slurmctld", "slurmd", "squeue", "sbatch", "sinfo")
DATABASE = ("slurmdbd", "mariadbd", "sacct")

CONF = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=20
CredType=cred/munge
MessageTimeout={silence}
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/run/spool-%n
MpiDefault=none
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
{accounting}
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
InactiveLimit=0
KillWait=1
MinJobAge={age}
SlurmctldTimeout=10
SlurmdTimeout={patience}
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=polite Nodes=n[1-2] MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=urgent Nodes=n[1-2] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

OCI_CONF = """
RunTimeQuery="runc --root={folder}/runc state %n.%u.%j.%s.%t"
RunTimeKill="runc --root={folder}/runc kill -a %n.%u.%j.%s.%t"
RunTimeDelete="runc --root={folder}/runc delete --force %n.%u.%j.%s.%t"
RunTimeRun="runc --root={folder}/runc run %n.%u.%j.%s.%t -b %b"
"""

DBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""

GRANTS = """
create database slurm_acct_db;
create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'127.0.0.1';
create user slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;
"""


SILENCE = 90
"""Seconds that Slurm's daemons and commands wait for one of them that is not scheduled for a while."""
LONG = 300
"""Seconds after which a command counts as hung."""


def missing(accounts: bool = False) -> list[str]:
    """Commands that a cluster needs and this machine lacks."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return [tool for tool in (*TOOLS, *(DATABASE if accounts else ())) if shutil.which(tool, path=path) is None]


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: It did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def working(folder: Path) -> list[str]:
    """Processes of jobs, in a container or outside, whose command line names a folder or something in it."""
    found, name = [], os.fsencode(folder)
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (path / "cmdline").read_bytes()
            python = b"python" in line.split(b"\0")[0]
            if python and (b"submitit.core._submit" in line or b"submitit.local._local" in line) and name in line:
                found.append(path.name)
    return found


class Cluster:
    """Two nodes on this machine, by default of two CPUs.

    Args:
        folder: For everything the daemons write.
        accounts: With slurmdbd.
        patience: Seconds until a silent node counts as down.
        age: Seconds that the controller remembers a finished job.
        cpus: CPUs of each node, whatever this machine has.
        gpus: Made up ones of each node: names of /dev/null, which Slurm hands out as it does devices.
        extra: A further line of slurm.conf.
    """

    def __init__(
        self, folder: Path, accounts: bool = False, patience: int = 300, age: int = 300, cpus: int = 2, gpus: int = 0,
        extra: str = "",
    ) -> None:  # fmt: skip
        self.folder, self._accounts, self._cpus, self._gpus = folder, accounts, cpus, gpus
        self._name = f"mir{secrets.token_hex(3)}"
        self._port, self._dbd, self._sql = _free_ports()
        for name in ("state", "log", "run", "etc"):
            (folder / name).mkdir(parents=True)
        self._write({"patience": patience, "age": age, "extra": extra})

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make Slurm's commands find this cluster."""
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "PATH": path}

    def run(self, *words: str, check: bool = True) -> str:
        """Output of a command on this cluster; repeated where a daemon did not answer, if it submits nothing."""
        environment = os.environ | self.environment
        end = time.monotonic() + (SILENCE if check and words[0] != "sbatch" else 0)
        while True:
            result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LONG, check=False)
            if not (result.returncode and TRANSIENT.search(result.stderr) and time.monotonic() < end):
                break
            time.sleep(0.5)
        assert result.returncode == 0 or not check, f"{words}: {result.stderr}"
        return result.stdout.strip()

    @property
    def version(self) -> str:
        """Slurm's version."""
        return self.run("sinfo", "--version")

    def start(self) -> None:
        """Starts all daemons and waits until the nodes are idle."""
        run = self.folder / "run"
        self.run(
            "munged", "--force", f"--key-file={self.folder}/etc/munge.key", f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munge.seed",
        )  # fmt: skip
        if self._accounts:
            self._database()
        self.control()
        for node in ("n1", "n2"):
            self.node(node)
        until(lambda: self.run("sinfo", "-h", "-o", "%T", "-p", "main", check=False) == "idle", 120, "idle nodes")

    def control(self) -> None:
        """Starts slurmctld."""
        self.run("slurmctld")

    def node(self, name: str) -> None:
        """Starts the slurmd of a node, which knows the nodes by their names: ranks meet at the first one's."""
        hosts = self.folder / "etc" / "hosts"
        hosts.write_text(f"127.0.0.1 localhost n1 n2 {socket.gethostname()}\n")
        line = f"mount --bind {hosts} /etc/hosts && exec slurmd -N {name}"
        self.run("unshare", "--mount", "sh", "-c", line)

    def kill(self, daemon: str, sign: int = signal.SIGTERM) -> None:
        """Ends a daemon by its pid file and waits."""
        for path in (self.folder / "run" / f"{daemon}.pid", self.folder / "db" / f"{daemon}.pid"):
            with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                pid = int(path.read_text())
                os.kill(pid, sign)
                until(lambda pid=pid: not _lives(pid), 60, f"end of {daemon}")

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons, by force where they do not heed the signal."""
        self.run("timeout", "5", "scancel", "--user=root", check=False)
        with suppress(AssertionError):
            until(lambda: not self.run("timeout", "5", "squeue", "--noheader", check=False), 20, "an empty queue")
        for daemon in ("slurmd-n1", "slurmd-n2", "slurmctld", "slurmdbd", "mariadb", "munged"):
            try:
                self.kill(daemon)
            except AssertionError:
                self.kill(daemon, signal.SIGKILL)

    def _write(self, options: dict[str, object]) -> None:
        key = self.folder / "etc" / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host, folder = socket.gethostname().partition(".")[0], self.folder
        accounting = "AccountingStorageType=accounting_storage/none"
        if self._accounts:
            lines = ("Type=accounting_storage/slurmdbd", "Host=localhost", f"Port={self._dbd}")
            accounting = "\n".join(f"AccountingStorage{line}" for line in (*lines, f"Pass={folder}/run/munge.sock"))
        common = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={self._cpus} RealMemory=2000 State=UNKNOWN"
        kinds, share = self._devices() if self._gpus else ("", "")
        nodes = kinds + "\n".join(f"NodeName=n{i} Port={self._port + i} {common}{share}" for i in (1, 2))
        values = {"name": self._name, "host": host, "folder": folder, "port": self._port, "nodes": nodes}
        values["silence"] = SILENCE
        text = CONF.format(**values, **options, accounting=accounting)
        (folder / "etc" / "slurm.conf").write_text(text)
        (folder / "etc" / "oci.conf").write_text(OCI_CONF.format(folder=folder))  # for srun --container
        dbd = folder / "etc" / "slurmdbd.conf"
        dbd.write_text(DBD_CONF.format(folder=folder, dbd=self._dbd, sql=self._sql))
        dbd.chmod(0o600)

    def _devices(self) -> tuple[str, str]:
        """The kind and a node's share of it in slurm.conf; writes gres.conf and its files."""
        for i in range(self._gpus):
            (self.folder / "etc" / f"gpu{i}").symlink_to("/dev/null")
        span = f"{self.folder}/etc/gpu[0-{self._gpus - 1}]"
        (self.folder / "etc" / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={span}\n")
        return "GresTypes=gpu\n", f" Gres=gpu:{self._gpus}"

    def _database(self) -> None:
        folder = self.folder / "db"
        folder.mkdir()
        for path in (self.folder, *self.folder.parents):
            if path.stat().st_uid == os.getuid() and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o011)  # mysql has to pass
        shutil.chown(folder, "mysql", "mysql")
        shared = ("--user=mysql", f"--datadir={folder}")
        self.run("mariadb-install-db", *shared, "--auth-root-authentication-method=normal", "--skip-test-db")
        subprocess.Popen(
            ["mariadbd", "--no-defaults", *shared, f"--socket={folder}/sock", f"--pid-file={folder}/mariadb.pid",
             "--bind-address=127.0.0.1", f"--port={self._sql}", "--innodb-buffer-pool-size=64M",
             "--innodb-lock-wait-timeout=900", f"--log-error={folder}/err.log"],
            env=os.environ | self.environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        client = ("--no-defaults", f"--socket={folder}/sock", "--user=root")
        until(lambda: "alive" in self.run("mariadb-admin", *client, "ping", check=False), 120, "MariaDB")
        self.run("mariadb", *client, f"--execute={GRANTS}")
        self.run("slurmdbd")
        until(lambda: _listens(self._dbd), 120, "slurmdbd")


def _free_ports() -> tuple[int, int, int]:
    """A base for controller and nodes, a port for slurmdbd and one for MariaDB, all free now."""
    for base in random.sample(range(18000, 26000, 200), 40):  # not the one that a session beside this one takes
        if all(map(_free, (base, base + 1, base + 2, base + 100, base + 101))):
            return base, base + 100, base + 101
    raise AssertionError("no free ports")


def free_port() -> int:
    """A port that is free and below those that outgoing connections get, so that it stays free until it is used."""
    return next(port for port in random.sample(range(27000, 32000), 100) if _free(port))


def _free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemons do
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
