"""A real Slurm on this machine: controller and nodes as processes of one PID namespace, for as long as the tests run.

Facts that this rests on (Debian's Slurm 22.05, no systemd, no cgroups):

- `slurmd -N` lets several nodes share a machine. Each gets namespaces of its own for host name and mounts, so that
  `hostname` says node1 and node1 resolves to loopback, while the machine's own /etc/hosts stays as it is.
- All nodes have the address 127.0.0.1 and differ by port: with an address each, steps could not call srun back.
- GPUs must be character devices to appear in CUDA_VISIBLE_DEVICES; these are copies of /dev/null that nobody opens.
- Everything runs in a PID namespace whose first process dies with the test session, and the kernel ends all others
  with it: daemons, jobs, and what jobs left behind.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "setpriv")
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_CONFIG = """\
ClusterName=local
SlurmctldHost=slurmctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=90
SchedulerParameters=sched_interval=2,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd-%n.log
GresTypes=gpu
"""

# The first process of the namespace: starts the daemons, then waits, which also buries orphans.
_INIT = """\
set -eu
state=$1 nodes=$2
ip link set lo up 2>/dev/null || true
start() { # HOST COMMAND...
    local host=$1
    shift
    setsid unshare --mount --uts bash -c 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' \\
        start "$host" "$state/hosts/$host" "$@" </dev/null >>"$state/log/$host.out" 2>&1 &
}
start slurmctl munged --foreground --num-threads=2 --socket="$state/munge/socket" --key-file="$state/munge/key" \\
    --pid-file="$state/munge/pid" --seed-file="$state/munge/seed" --log-file="$state/log/munged.log"
for _ in $(seq 100); do
    munge -S "$state/munge/socket" -n >/dev/null 2>&1 && break
    sleep 0.1
done
start slurmctl slurmctld -D
for k in $(seq "$nodes"); do start "node$k" slurmd -D -N "node$k"; done
while :; do wait; sleep 1; done
"""


def why_unavailable() -> str | None:
    """The reason, for skipping; None: it can be started."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_SEARCH_PATH) is None]
    if missing:
        return f"Slurm is not installed (missing: {', '.join(missing)}); run tests/slurm/install.sh as root"
    if os.geteuid() != 0:
        return "a local Slurm needs root"
    if subprocess.run(["unshare", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this container may not create namespaces, so there can be no emulated nodes"
    return None


@dataclass
class LocalSlurm:
    """A cluster of emulated nodes; use it as a context."""

    nodes: int = 2
    cpus: int = 64
    gpus: int = 4
    gpu_type: str = "a100"

    def __enter__(self) -> LocalSlurm:
        # Unix sockets below it have at most 108 characters.
        self.state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(self.state, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands; nothing of a cluster that the tests may run on."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_", "SRUN_", "NEMO_"))
        }
        return {**clean, "SLURM_CONF": str(self.state / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **variables: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            command, env={**self.environment, **variables}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says; empty for one that is not known (any more)."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id, check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_until_ended(self, job_id: str, seconds: float) -> dict[str, str]:
        """Wait for a job's end, through requeues; its description."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        held_since: float | None = None
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if job.get("JobState") in final:
                return job
            # Slurm holds requeued jobs back for two minutes. A few seconds are enough for the nodes to forget the
            # turn before; without them they refuse the job.
            held = job.get("JobState") == "PENDING" and job.get("Reason") == "BeginTime"
            held_since = (held_since or time.monotonic()) if held else None
            if held_since is not None and time.monotonic() - held_since > 4:
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
                held_since = None
            time.sleep(0.3)
        raise AssertionError(f"job {job_id} has not ended in {seconds:.0f} s: {self.job(job_id)}")

    def _write_files(self) -> None:
        for name in ("log", "ctld", "munge", "hosts", "dev"):
            (self.state / name).mkdir()
        self.state.chmod(0o755)
        (self.state / "munge").chmod(0o755)
        key = self.state / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = [f"node{k}" for k in range(1, self.nodes + 1)]
        others = [line for line in Path("/etc/hosts").read_text().splitlines() if not set(line.split()) & set(names)]
        for host in ("slurmctl", *names):
            # 127.0.0.1 resolves to the first name that stands beside it.
            own = [f"127.0.0.1 {name}" for name in dict.fromkeys((host, "localhost", "slurmctl", *names))]
            (self.state / "hosts" / host).write_text("\n".join([*own, *others]) + "\n")
        for k in range(self.gpus):
            os.mknod(self.state / "dev" / f"gpu{k}", 0o020666, os.makedev(1, 3))
        devices = f"{self.state}/dev/gpu[0-{self.gpus - 1}]"
        (self.state / "gres.conf").write_text(f"Name=gpu Type={self.gpu_type} File={devices}\n")
        ports = _free_ports(self.nodes + 1)
        lines = [_CONFIG.format(state=self.state, port=ports[0])]
        for name, port in zip(names, ports[1:], strict=True):
            (self.state / "spool" / name).mkdir(parents=True)
            lines.append(
                f"NodeName={name} NodeAddr=127.0.0.1 Port={port} Sockets=1 CoresPerSocket={self.cpus} "
                f"ThreadsPerCore=1 RealMemory=256000 Gres=gpu:{self.gpu_type}:{self.gpus} State=UNKNOWN\n"
            )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
        lines.append("PartitionName=other Nodes=ALL MaxTime=INFINITE State=UP\n")
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10\n")
        (self.state / "slurm.conf").write_text("".join(lines))

    def _start(self) -> None:
        init = self.state / "init.sh"
        init.write_text(_INIT)
        # Killed with its parent, and the namespace with it: nothing outlives even a killed test session.
        self._process = subprocess.Popen(
            f"setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount-proc --mount --uts "
            f"bash {init} {self.state} {self.nodes}".split(),
            env={"PATH": _SEARCH_PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(self.state / "slurm.conf")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t", check=False).split()
            if states.count("idle") == self.nodes:
                return
            time.sleep(0.2)
        logs = "\n".join(f"--- {path}\n{path.read_text()[-1500:]}" for path in sorted(self.state.glob("log/*")))
        raise AssertionError(f"the local Slurm did not start:\n{logs}")


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at the moment, below the range that the kernel gives out by itself."""
    found: list[int] = []
    port = 15000 + os.getpid() % 4000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found
