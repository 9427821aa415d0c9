"""A real Slurm on one machine: munged, slurmctld, and one slurmd for each node.

A node runs in namespaces of its own: it has its own address, host name, process numbers and
/dev/shm, and reaches the others over a bridge, so a launcher that assumes localhost fails here as
it does on a cluster. Killing the first process of a node is a crash of that node. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
_READY_SECONDS = 60.0
_PATIENCE = 5.0
"""Times as long as on an idle machine that anything may take."""


def missing(accounting: bool = False) -> str | None:
    """Return why a cluster cannot be started here; None: it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    absent = [
        name
        for name in PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
        if shutil.which(name) is None
    ]
    if absent:
        return f"needs {', '.join(absent)}; `make test-slurm` installs them from Debian packages"
    if subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "needs to make namespaces, which this machine does not let it"
    return None


def until(
    condition: Callable[[], object],
    seconds: float,
    description: str,
    evidence: Callable[[], str] = str,
    pause: float = 0.1,
) -> None:
    """Wait for something that is expected to happen.

    Args:
        condition: true when it has happened.
        seconds: limit on an idle machine; other work beside it is given time.
        description: what is waited for, for the message.
        evidence: returns what may explain why it did not happen.
        pause: seconds between two looks.
    """
    limit = seconds * _PATIENCE
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not in {limit:g} s: {description}\n{evidence()}"
        time.sleep(pause)


@dataclass
class Cluster:
    """A cluster in a folder; `start` and `stop` it.

    Attributes:
        root: folder of all its files.
        index: keeps several clusters of one machine apart.
        islands: groups of nodes with partitions of their own (main and scavenge; main1 and
            scavenge1; ...), for tests side by side.
        nodes, cpus, gpus, memory: nodes of an island, and what each has (memory in MB; the GPUs are
            device files only).
        accounting: with slurmdbd and its database, and accounts that are enforced.
        forget_seconds: after which a finished job is no longer in slurmctld.
    """

    root: Path
    index: int = 0
    islands: int = 1
    nodes: int = 3
    cpus: int = 8
    gpus: int = 4
    memory: int = 8000
    accounting: bool = False
    forget_seconds: int = 3600
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def all_nodes(self) -> range:
        return range(self.islands * self.nodes)

    def nodes_of(self, island: int) -> range:
        return range(island * self.nodes, (island + 1) * self.nodes)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def run(self, *words: str, check: bool = True) -> str:
        """Output of a command that talks to this cluster."""
        done = subprocess.run(
            words, env=self.environment(), capture_output=True, text=True, timeout=300
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    # -- start and stop ----------------------------------------------------------------------------

    def start(self) -> Cluster:
        """Start everything and wait until every node is idle."""
        for name in ("state", "spool", "log", "dev", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        self._network()
        munge = self.root / "munge"
        munge.chmod(0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        paths = [
            f"--{name}={munge / file}"
            for name, file in (
                ("key-file", "key"),
                ("socket", "sock"),
                ("pid-file", "pid"),
                ("seed-file", "seed"),
                ("log-file", "log"),
            )
        ]
        self._spawn("munged", "munged", "--foreground", "--force", *paths)
        until((munge / "sock").exists, _READY_SECONDS, "munged's socket")
        if self.accounting:
            self._start_accounting()
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        for node in self.all_nodes:
            self.start_node(node)
        self._wait_idle(self.all_nodes)
        return self

    def stop(self) -> None:
        """End everything that was started here, and remove its network."""
        for node in self.all_nodes:
            self.kill_node(node)
        for name in reversed(list(self._processes)):
            self._end(name)
        for node in self.all_nodes:
            subprocess.run(["ip", "netns", "del", self._namespace(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def start_node(self, node: int) -> None:
        """Start a node, also one that crashed."""
        name, namespace = f"n{node}", self._namespace(node)
        if not Path("/run/netns", namespace).exists():
            self._connect(node)
        (self.root / "spool" / name).mkdir(exist_ok=True)
        # The shell stays, as the node's init: it reaps orphans, and its end is the end of all.
        script = (
            'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf"'
            " /etc/nsswitch.conf; mount -t tmpfs -o mode=1777 shm /dev/shm; ulimit -c 0; slurmd -D"
            ' -N "$1" & while :; do wait -n || [ $? -ne 127 ] || break; done'
        )
        inside = [
            "unshare",
            "--uts",
            "--ipc",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        self._spawn(
            name,
            "nsenter",
            f"--net=/run/netns/{namespace}",
            *inside,
            "bash",
            "-c",
            script,
            "node",
            name,
            str(self.root),
        )

    def kill_node(self, node: int) -> None:
        """A crash: every process of the node is gone at once."""
        process = self._processes.pop(f"n{node}", None)
        if process is not None:
            process.kill()
            process.wait()

    def revive(self, island: int) -> None:
        """Start the nodes of an island that were killed, and wait until every one is idle."""
        for node in self.nodes_of(island):
            if f"n{node}" not in self._processes:
                self.start_node(node)
        self._wait_idle(self.nodes_of(island))

    def inside(self, node: int, *words: str) -> None:
        """Run a command in the namespaces of a node."""
        leader = self._processes[f"n{node}"].pid
        # nsenter became unshare, which forked the node's init.
        init = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()[0]
        subprocess.run(["nsenter", f"--target={init}", "--all", *words], check=True)

    def tail(self) -> str:
        """The ends of the logs, for a message."""
        return "\n".join(
            path.read_text(errors="replace")[-1500:] for path in (self.root / "log").glob("*.log")
        )

    # -- parts -------------------------------------------------------------------------------------

    @property
    def _bridge(self) -> str:
        return f"llbr{self.index}"

    def _namespace(self, node: int) -> str:
        return f"ll{self.index}n{node}"

    def _address(self, last: int) -> str:
        return f"10.77.{self.index}.{last}"

    def _wait_idle(self, nodes: range) -> None:
        names = {f"n{node}" for node in nodes}
        until(
            lambda: names <= self._idle(),
            _READY_SECONDS,
            f"idle nodes: {sorted(names)}",
            self.tail,
        )

    def _idle(self) -> set[str]:
        rows = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return {row.split()[0] for row in rows if row.endswith(" idle")}

    def _network(self) -> None:
        self.stop()  # what a killed earlier session left under these names
        for words in (["add", self._bridge, "type", "bridge"], ["set", self._bridge, "up"]):
            subprocess.run(["ip", "link", *words], check=True)
        subprocess.run(
            ["ip", "addr", "add", f"{self._address(1)}/24", "dev", self._bridge], check=True
        )

    def _connect(self, node: int) -> None:
        """A network namespace with one end of a cable in it, and the other in the bridge."""
        namespace, cable = self._namespace(node), f"ll{self.index}v{node}"
        subprocess.run(["ip", "link", "del", cable], capture_output=True)
        commands = (
            ["ip", "netns", "add", namespace],
            [
                "ip",
                "link",
                "add",
                cable,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                namespace,
            ],
            ["ip", "link", "set", cable, "master", self._bridge, "up"],
            ["ip", "-n", namespace, "link", "set", "lo", "up"],
            ["ip", "-n", namespace, "addr", "add", f"{self._address(10 + node)}/24", "dev", "eth0"],
            ["ip", "-n", namespace, "link", "set", "eth0", "up"],
            ["ip", "-n", namespace, "route", "add", "default", "via", self._address(1)],
        )
        for words in commands:
            subprocess.run(words, check=True)

    def _configure(self) -> None:
        host = os.uname().nodename.split(".")[0]
        hosts = [
            "127.0.0.1 localhost",
            f"{self._address(1)} {host}",
            *(f"{self._address(10 + i)} n{i}" for i in self.all_nodes),
        ]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        # No DNS inside: without this, looking up an IPv6 address of a node takes ten seconds.
        (self.root / "nsswitch.conf").write_text(
            "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
        )
        for gpu in range(self.gpus):
            device = self.root / "dev" / f"nvidia{gpu}"
            if not device.exists():
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        names = f"n[0-{self.all_nodes[-1]}]"
        (self.root / "gres.conf").write_text(
            f"NodeName={names} Name=gpu File={self.root}/dev/nvidia[0-{self.gpus - 1}]\n"
        )
        accounting = (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\nAccountingStoragePort={self._port + 2}\n"  # noqa: E501
            f"AccountingStoragePass={self.root}/munge/sock\nAccountingStorageEnforce=associations,limits,qos\n"
            if self.accounting
            else "AccountingStorageType=accounting_storage/none\n"
        )
        addresses = f"10.77.{self.index}.[10-{10 + self.all_nodes[-1]}]"
        text = _CONF.format(
            host=host,
            self=self,
            addresses=addresses,
            names=names,
            accounting=accounting,
            slurmd=self._port + 1,
        )
        for island in range(self.islands):
            own = self.nodes_of(island)
            text += _PARTITIONS.format(
                suffix=island or "",
                nodes=f"n[{own[0]}-{own[-1]}]",
                default="NO" if island else "YES",
            )
        self.conf.write_text(text)

    @property
    def _port(self) -> int:
        return 16817 + 10 * self.index

    def _start_accounting(self) -> None:
        """MariaDB and slurmdbd, and a cluster with one account."""
        data, socket = self.root / "mysql", self.root / "mysql.sock"
        subprocess.run(
            [
                "mariadb-install-db",
                f"--datadir={data}",
                "--user=root",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ],
            check=True,
            capture_output=True,
        )
        words = [
            f"--datadir={data}",
            f"--socket={socket}",
            f"--port={self._port + 3}",
            "--bind-address=127.0.0.1",
            "--user=root",
        ]
        self._spawn(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            *words,
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
        )
        until(socket.exists, _READY_SECONDS, "MariaDB's socket", self.tail)
        conf = self.root / "slurmdbd.conf"
        conf.write_text(
            _DBD.format(
                self=self,
                port=self._port + 2,
                store=self._port + 3,
                host=os.uname().nodename.split(".")[0],
            )
        )
        conf.chmod(0o600)
        self._spawn("slurmdbd", "slurmdbd", "-D")
        sacctmgr = ["sacctmgr", "--immediate", "add"]
        until(
            lambda: (
                "ci" in self.run("sacctmgr", "--noheader", "show", "cluster", check=False)
                or self._add_cluster()
            ),
            _READY_SECONDS,
            "slurmdbd",
            self.tail,
        )
        self.run(*sacctmgr, "account", "science", "cluster=ci")
        self.run(*sacctmgr, "user", "root", "account=science", check=False)

    def _add_cluster(self) -> bool:
        self.run("sacctmgr", "--immediate", "add", "cluster", "ci", check=False)
        return False

    def _spawn(self, name: str, *words: str) -> None:
        with open(self.root / "log" / f"{name}.log", "ab") as log:
            environment = {**self.environment(), "ROOT": str(self.root)}
            self._processes[name] = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_CONF = """\
ClusterName=ci
SlurmctldHost={host}(10.77.{self.index}.1)
SlurmctldPort={self._port}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job has to wait at least (usually 120 s).
AuthInfo=socket={self.root}/munge/sock,cred_expire=5
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool/%n
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A lost node is noticed in seconds, but one that a busy machine keeps from answering for a while is
# not lost. SIGKILL follows SIGTERM after twenty, in which such a machine, too, gets through a step
# and a save.
SlurmdTimeout=12
SlurmctldTimeout=6
MessageTimeout=10
KillWait=20
UnkillableStepTimeout=30
MinJobAge={self.forget_seconds}
InactiveLimit=0
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={names} NodeAddr={addresses} CPUs={self.cpus} RealMemory={self.memory} Gres=gpu:{self.gpus} State=UNKNOWN
"""  # noqa: E501
_PARTITIONS = """\
PartitionName=main{suffix} Nodes={nodes} Default={default} MaxTime=120 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=scavenge{suffix} Nodes={nodes} MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
"""  # noqa: E501
_DBD = """\
AuthType=auth/munge
AuthInfo=socket={self.root}/munge/sock
DbdHost={host}
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={store}
StorageUser=root
StorageLoc=slurm
PidFile={self.root}/slurmdbd.pid
"""
