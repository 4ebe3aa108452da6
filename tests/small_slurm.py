"""A Slurm of one node on loopback: munged, slurmctld and slurmd of this test, with files of their own in one folder.

Needs Debian's packages slurm-wlm and munge, and root. Two partitions: what runs in `low` is preempted by `high`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
CONF = """\
ClusterName=small
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerParameters=bf_interval=1,sched_interval=5,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=300
MessageTimeout=10
NodeName={name} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={name} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30 OverSubscribe=NO
PartitionName=high Nodes={name} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""


def missing() -> str:
    """Why no Slurm can be started here; empty: one can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "starting a Slurm needs root"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """The first true answer."""
    give_up = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < give_up, f"after {seconds} s still not: {why}"
        time.sleep(0.2)
    return answer


class SmallSlurm:
    """The three daemons; `environment` is what its commands need."""

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.daemons = folder, dict[str, subprocess.Popen[bytes]]()
        self.words: dict[str, tuple[str, ...]] = {}  # with which each daemon was started
        self.name = socket.gethostname().split(".")[0]
        for part in ("state", "spool"):
            (folder / part).mkdir(parents=True)
        conf = CONF.format(name=self.name, ports=free_ports(2), folder=folder, cpus=cpus)
        (folder / "slurm.conf").write_text(conf)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SmallSlurm":
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder / f'munge.{file}'}" for option, file in files.items()]
        self.daemon("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists, 20, "munged listens")
        self.daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        self.daemon("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", self.name)
        wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), 40, "the node is idle")
        return self

    def __exit__(self, *_: Any) -> None:
        self.ask("scancel", "--me")
        wait_for(lambda: not self.ask("squeue", "-h"), 60, "the queue is empty")
        for name in reversed(list(self.daemons)):
            self.stop(name)

    def daemon(self, name: str, *options: str) -> None:
        """Start one in the foreground."""
        self.words[name] = (name, *options)
        with open(self.folder / f"{name}.said", "ab") as said:
            self.daemons[name] = subprocess.Popen(
                [name, *options], stdout=said, stderr=said, env={**os.environ, **self.environment}
            )

    def stop(self, name: str) -> None:
        """End one, as an administrator would."""
        self.daemons[name].terminate()
        try:
            self.daemons[name].wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.daemons[name].kill()
            self.daemons[name].wait()

    def again(self, name: str) -> None:
        """Start one that has ended, as it was."""
        self.daemon(*self.words[name])

    def die(self) -> None:
        """The node's power fails: what runs there is gone in one moment, and nobody has been told."""
        ours = [psutil.Process(self.daemons["slurmd"].pid)]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                told = process.environ()
                if told.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in told:
                    ours += [process, *(parent for parent in process.parents() if parent.name() == "slurmstepd")]
        for process in ours:  # at once: whoever is left for a moment would tell of the others
            with suppress(psutil.Error):
                process.suspend()
        for process in ours:
            with suppress(psutil.Error):
                process.kill()
        self.daemons["slurmd"].wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says."""
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **self.environment}, timeout=60, check=False
        )
        return done.stdout + done.stderr
