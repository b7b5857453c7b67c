"""A real Slurm on this machine: munged, slurmctld and one slurmd a node, all children of the process that started them.

    python -m tests.slurm.cluster           # runs until Ctrl-C and prints what to export
    with Cluster(folder) as cluster: …      # what the tests do

Nodes are machines as far as the kernel allows: with namespaces each has its own network, address, host name, /etc/hosts
and process ids, and killing its first process powers it off. Where namespaces are forbidden the nodes share this
machine's address and differ by port. Everything ends with its parent, by process id, also when that is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CPUS, MEMORY_MIB, GPUS = 8, 8000, 2
BRIDGE = "phi3sl"

# cred_expire is also how long a requeued job waits before it may start again
CONF = """
ClusterName=phi3dist
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/state/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1,bf_resolution=60
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""

# The first process of a node: waits for its end of the cable, then keeps slurmd. $1 name, $2 address, $3 folder
INIT = """
hostname "$1" && mount --bind "$3/hosts" /etc/hosts && ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$2/24" dev eth0 && ip link set eth0 up
slurmd -D -f "$3/slurm.conf" -N "$1" >>"$3/log/slurmd.$1.start.log" 2>&1 &
wait $!
"""


def why_not() -> str:
    """Why no cluster can be started here, or an empty text."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(missing)} (make test-slurm installs {PACKAGES})" if missing else ""


def namespaces_work() -> bool:
    """Whether this kernel lets us build nodes with a network of their own. Tried, since no version number tells."""
    probe, peer = f"{BRIDGE}pa", f"{BRIDGE}pb"
    tries = (
        ["unshare", "-n", "-u", "-m", "-p", "--fork", "--mount-proc", "true"],
        ["ip", "link", "add", probe, "type", "veth", "peer", "name", peer],
        ["ip", "link", "del", probe],
    )
    if shutil.which("ip", path=PATH) is None or shutil.which("unshare", path=PATH) is None:
        return False
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in tries)


def own_address() -> str:
    """This machine's address on its network, or the loopback address where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # a datagram socket sends nothing here; the kernel picks the interface
        return str(probe.getsockname()[0])
    return "127.0.0.1"


_SERIAL = itertools.count()


class Cluster:
    """Two nodes with `CPUS` CPUs and `GPUS` pretended GPUs each. Partition `high` preempts `main`."""

    def __init__(self, folder: Path, nodes: int = 2, namespaces: bool | None = None) -> None:
        self.folder = folder
        self.names = [f"node{i + 1}" for i in range(nodes)]
        self.namespaces = namespaces_work() if namespaces is None else namespaces
        # clusters of several sessions, or of one, must not meet
        slot = (os.getpid() + 101 * next(_SERIAL)) % 500
        self.port = 27000 + 8 * slot
        self.net = f"10.{230 + slot // 250}.{slot % 250}"
        self.bridge = f"{BRIDGE}{os.getpid()}"
        self.shared_address = own_address()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        """Environment for the clients: this cluster, and nothing of a job that we may be running in."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def address(self, name: str) -> str:
        return f"{self.net}.{self.names.index(name) + 11}" if self.namespaces else self.shared_address

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._start_controller()
            for name in self.names:
                self.power_on(name)
            self.wait_for(f"{len(self.names)} usable nodes", lambda: len(self._usable()) == len(self.names))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.namespaces and "slurmctld" in self.daemons:
            # in namespaces every task dies with its node; here slurmd would leave them behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", "-f", "-u", "root"], env=self.env, timeout=5, capture_output=True, check=False
                )
                self.wait_for("the end of all jobs", lambda: not self.client("squeue", "-h", "-t", "R,CG"), fail=False)
        for name in [n for n in self.daemons if n in self.names]:
            self.power_off(name)
        for name in ("slurmctld", "munged"):
            if (daemon := self.daemons.pop(name, None)) is not None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        if self.namespaces:
            subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)

    def client(self, *command: str, check: bool = True) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def in_node(self, name: str, *command: str) -> list[str]:
        """`command` as it is run on a node: in its namespaces, or here where the nodes are this machine."""
        if not self.namespaces:
            return list(command)
        first = next(iter(_children(self.daemons[name].pid)))
        return ["nsenter", "-t", str(first), "-n", "-u", "-m", "-p", "-r", *command]

    def power_off(self, name: str) -> None:
        """Kill everything on a node at once (without namespaces: its slurmd alone)."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def power_on(self, name: str) -> None:
        (self.folder / "state" / name).mkdir(exist_ok=True)
        conf = str(self.folder / "slurm.conf")
        if not self.namespaces:
            self._start(name, ["slurmd", "-D", "-f", conf, "-N", name])
            return
        self._start(name, ["unshare", "-n", "-u", "-m", "-p", "--fork", "--kill-child", "--mount-proc",
                           "bash", "-c", INIT, "init", name, self.address(name), str(self.folder)])  # fmt: skip
        self.wait_for(f"the namespace of {name}", lambda: bool(_children(self.daemons[name].pid)))
        cable, first = f"p3{os.getpid()}n{self.names.index(name)}", _children(self.daemons[name].pid)[0]
        subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)
        for command in (
            ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(first)],
            ["ip", "link", "set", cable, "master", self.bridge, "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 30, fail: bool = True) -> None:
        end = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if fail and (dead or time.monotonic() > end):
                logs = "".join(f"\n== {p.name}\n{_tail(p)}" for p in sorted((self.folder / "log").iterdir()))
                raise RuntimeError(f"waited for {what}; ended meanwhile: {dead or 'nothing'}{logs}")
            if time.monotonic() > end:
                return
            time.sleep(0.05)

    def _usable(self) -> list[str]:
        states = self.client("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False).splitlines()
        return [line.split()[0] for line in states if line.split()[1] in ("idle", "mix", "alloc")]

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.start.log").open("ab") as log:
            # a clean environment, so that nothing of ours reaches a job through its node
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env={"PATH": PATH, "HOME": "/root"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _start_controller(self) -> None:
        munge = self.folder / "munge"
        # --force: a folder below /tmp is one that munged calls insecure
        self._start("munged", ["munged", "--foreground", "--force", f"--socket={munge}/socket",
                               f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
                               f"--log-file={munge}/log"])  # fmt: skip
        self.wait_for("munged", (munge / "socket").exists)
        if self.namespaces:
            for leftover in _orphan_bridges():
                subprocess.run(["ip", "link", "del", leftover], capture_output=True, check=False)
            for command in (
                ["ip", "link", "add", self.bridge, "type", "bridge"],
                ["ip", "addr", "add", f"{self.net}.1/24", "dev", self.bridge],
                ["ip", "link", "set", self.bridge, "up"],
            ):
                subprocess.run(command, check=True, capture_output=True)
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])

    def _write_files(self) -> None:
        for name in ("log", "state", "munge", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        controller = f"{self.net}.1" if self.namespaces else "127.0.0.1"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name if self.namespaces else host} NodeAddr={self.address(name)} "
            f"Port={self.port + 1 + i} CPUs={CPUS} RealMemory={MEMORY_MIB} Gres=gpu:{GPUS} State=UNKNOWN"
            for i, name in enumerate(self.names)
        )
        conf = CONF.format(host=host, controller=controller, port=self.port, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        # Slurm asks for character devices, follows links, and never opens them
        for gpu in range(GPUS):
            (self.folder / "gpu" / f"nvidia{gpu}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={','.join(self.names)} Name=gpu "
            f"File={self.folder}/gpu/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
        )
        addresses = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{controller} {host}\n{addresses}")


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _orphan_bridges() -> Iterator[str]:
    """Bridges whose cluster was killed so hard that it could not remove them. The process id is in the name."""
    for entry in Path("/sys/class/net").glob(f"{BRIDGE}*[0-9]"):
        pid = entry.name.removeprefix(BRIDGE)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            yield entry.name


def _tail(path: Path, lines: int = 8) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="phi3-slurm-") as folder, Cluster(Path(folder)) as cluster:
        print(f"export SLURM_CONF={folder}/slurm.conf    # {'namespaces' if cluster.namespaces else 'shared'}")
        print("Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
