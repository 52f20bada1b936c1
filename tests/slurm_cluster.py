"""A real SLURM on this machine: munged, slurmctld and a slurmd for each node, in a folder and on ports of its own."""

import ctypes
import fcntl
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
CPUS = 4
GRACE = 60
"""Seconds that a preempted job has to end by itself."""
SETTLE_S = 2.0
"""Seconds after which a requeued job may start. SLURM counts in seconds when it takes a job's credential back: one that
starts again within the same second is refused ("Job credential revoked"), and fails with an empty log."""
WAIT_S = 900
"""Seconds after which what a test waits for will not come, on a busy machine either."""

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=60
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class Missing(Exception):
    """SLURM cannot be had here; the message says why."""


class Cluster:
    """``with Cluster() as cluster``: commands run with ``cluster.environment``. Its nodes are n1, n2, ..."""

    def __init__(self, nodes: int = 1) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._stack = ExitStack()
        self.folder: Path
        self.environment: dict[str, str] = {}

    def __enter__(self) -> "Cluster":
        install()
        with ExitStack() as stack:
            # A socket's path has at most 107 characters: pytest's own folders are too deep.
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")))
            self.folder.chmod(0o755)
            self._write_conf()
            self._start_all(stack)
            stack.callback(self.cancel_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _write_conf(self) -> None:
        host, (control, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=1000"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        settings = {
            "host": host,
            "user": getpass.getuser(),
            "folder": self.folder,
            "port": control,
            "nodes": "\n".join(nodes),
            "grace": GRACE,
        }
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONF.format(**settings))
        if slurm_version() >= (23, 11):  # before it neither knew the word nor looked for cgroups
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start_all(self, stack: ExitStack) -> None:
        at = self.folder
        own = [f"--{name}={at}/munge.{file}" for name, file in (("key-file", "key"), ("socket", "socket"))]
        own += [f"--{name}-file={at}/munge.{name}" for name in ("pid", "log", "seed")]
        self._start(stack, "munged", "--foreground", "--force", *own)
        wait_for(lambda: (at / "munge.socket").exists(), lambda: "munged", 120)
        self._start(stack, "slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start(stack, "slurmd", "-D", "-N", node)
        idle = ["idle"] * len(self.nodes)
        look = ("sinfo", "-hN", "-p", "low", "-o", "%T")
        wait_for(lambda: self.try_run(*look).split() == idle, lambda: f"the nodes: {self.complaints()}", 180)

    def _start(self, stack: ExitStack, *command: str) -> None:
        log = stack.enter_context((self.folder / f"{command[0]}.out").open("a"))
        program = find(command[0])
        assert program is not None
        daemon = subprocess.Popen(
            [program, *command[1:]],
            env=os.environ | self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_ends_with_its_parent,
            start_new_session=True,
        )
        stack.callback(_end, daemon)

    # What tests do with it.

    def cancel_all(self) -> None:
        """Empty the queue, and wait until it is."""
        self.try_run("scancel", f"--user={getpass.getuser()}")
        wait_for(lambda: not self.run("squeue", "-h"), lambda: f"the last job's end: {self.run('squeue')}", 120)

    def try_run(self, *command: str) -> str:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=120)
        return done.stdout

    def run(self, *command: str, **environment: str) -> str:
        """What a command of SLURM prints; it must succeed."""
        env = os.environ | self.environment | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, Reason and more."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def queue(self) -> list[str]:
        """The jobs that wait or run: 17, or 17_3 in an array."""
        return self.run("squeue", "-h", "--array", "--states=PENDING,RUNNING", "--format=%i").split()

    def wait_for_state(self, job: str, *states: str) -> None:
        wait_for(lambda: self.job(job)["JobState"] in states, lambda: f"{job} to be {states}: {self.job(job)}")

    def start_again(self, job: str, *changes: str) -> None:
        """Wait until a job is back in the queue, and spare it the two minutes that SLURM lets it wait there.

        ``changes`` to what it asked for are written as `scontrol update` takes them.
        """

        def waits_or_over() -> bool:
            known = self.job(job)
            waits = known["JobState"] == "PENDING" and int(known["Restarts"]) >= 1
            return waits or known["JobState"] in ENDED

        wait_for(waits_or_over, lambda: f"{job} to be requeued: {self.job(job)}")
        assert self.job(job)["JobState"] == "PENDING", self.job(job)
        time.sleep(SETTLE_S)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now", *changes)

    def complaints(self) -> str:
        """What the daemons call errors."""
        logs = [self.folder / "slurmctld.log", *self.folder.glob("slurmd-*.log")]
        lines = [line for log in logs for line in log.read_text().splitlines()]
        return "\n".join(line for line in lines if "error" in line and not _AT_EACH_START.search(line))

    def preempt(self, seconds: float = 1, node: str = "n1") -> str:
        """A job of higher priority that needs the whole node; its number."""
        needs = ["--partition=high", "--nodes=1", f"--nodelist={node}", f"--ntasks={CPUS}"]
        return self.run("sbatch", "--parsable", *needs, "-o/dev/null", f"--wrap=sleep {seconds}")


_AT_EACH_START = re.compile("pmi|MPI|state file|state save file|Domain socket|hwloc")
"""Of what the daemons call errors: what they say whenever they begin with nothing."""


def short(root: Path) -> list[str]:
    """A run of seven steps and a validation."""
    return [
        "stage=sft",
        "debug=miniature",
        f"paths.root={root}",
        "logger=none",
        "test=false",
        "evaluation={samples: 0, max_new_tokens: 4}",
        "data.phases=[{epochs: 1, lr: [1e-3, 1e-4], max_length: 512}]",
    ]


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + os.pathsep + "/usr/sbin:/sbin")


def install() -> None:
    """Debian's packages, where they are missing and may be installed.

    Raises:
        Missing: with the reason.
    """
    with Path(tempfile.gettempdir(), f"install-slurm-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        missing = [program for program in PROGRAMS if find(program) is None]
        if not missing:
            return
        if os.getuid() != 0 or shutil.which("apt-get") is None:
            raise Missing(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge, as root")
        command = "apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get install -qy slurm-wlm munge"
        try:
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise Missing("apt-get install slurm-wlm munge took more than ten minutes") from error
        if done.returncode:
            raise Missing(f"apt-get install slurm-wlm munge: {done.stderr.strip().splitlines()[-1:]}")


def slurm_version() -> tuple[int, int]:
    said = subprocess.run([find("slurmctld") or "", "-V"], capture_output=True, text=True).stdout
    major, minor = re.findall(r"(\d+)\.(\d+)", said)[0]
    return int(major), int(minor)


def wait_for(condition: Callable[[], object], what: Callable[[], str], timeout: float = WAIT_S) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what()}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _ends_with_its_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
