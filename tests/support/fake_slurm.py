"""SLURM's commands, as far as a batch script and submitit use them, on this machine: tasks are processes here.

As a program it is whichever command it is called as. A job's directory below ``FAKE_SLURM`` has its script, its state,
the process of each task, and what was asked of it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "sacct")


def install(directory: Path, monkeypatch) -> None:
    """Puts the commands on the ``PATH`` of this process and its children."""
    monkeypatch.setenv("FAKE_SLURM", str(directory))
    with socket.socket() as listener:
        listener.bind(("", 0))
        monkeypatch.setenv("FAKE_SLURM_PORT", str(listener.getsockname()[1]))
    (directory / "bin").mkdir(parents=True)
    for name in COMMANDS:
        program = directory / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory / 'bin'}:{os.environ['PATH']}")


def warn(directory: Path, job_id: str) -> None:
    """Sends the tasks of a job the signal that its script asked for."""
    name = re.search(r"--signal=(\w+)@", (directory / job_id / "script").read_text())[1]
    for file in (directory / job_id).glob("task-*"):
        os.kill(int(file.read_text()), signal.Signals[f"SIG{name}"])


def wait(directory: Path, job_id: str, timeout: float = 100) -> str:
    """The state in which a job ended."""
    limit = time.monotonic() + timeout
    while not (directory / job_id / "state").exists():
        assert time.monotonic() < limit, (directory / job_id / "output").read_text()
        time.sleep(0.05)
    return (directory / job_id / "state").read_text()


def _sbatch(jobs: Path, arguments: list[str]) -> None:
    script = Path(arguments[-1]).read_text()
    job_id = str(1001 + sum(1 for _ in jobs.glob("1*")))
    array = re.search(r"^#SBATCH --array=0-(\d+)", script, re.MULTILINE)
    for name in [f"{job_id}_{i}" for i in range(int(array[1]) + 1)] if array else [job_id]:
        (jobs / name).mkdir()
        (jobs / name / "script").write_text(script)
        with (jobs / name / "output").open("w") as output:
            subprocess.Popen(
                [sys.executable, __file__, "run", name], stdout=output, stderr=output, start_new_session=True
            )
    print(f"Submitted batch job {job_id}")


def _run(jobs: Path, arguments: list[str]) -> None:
    """Runs a job's script, again as often as it was requeued."""
    job = jobs / arguments[0]
    job_id, _, task = job.name.partition("_")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (job / "script").read_text(), re.MULTILINE))
    environment = os.environ | {
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_NNODES": options["nodes"],
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        # each job of every test has the same number here, from which Lightning would take the port
        "MASTER_PORT": str(int(os.environ["FAKE_SLURM_PORT"]) + int(task or 0)),
    }
    if task:
        environment |= {"SLURM_ARRAY_JOB_ID": job_id, "SLURM_ARRAY_TASK_ID": task}
    for count in range(10):
        restarts = {"SLURM_RESTART_COUNT": str(count)} if count else {}
        status = subprocess.run(["bash", str(job / "script")], env=environment | restarts, check=False).returncode
        if not (job / "requeue").exists():
            break
        (job / "requeue").unlink()
    (job / "state").write_text("COMPLETED" if status == 0 else f"FAILED {status}")


def _srun(jobs: Path, arguments: list[str]) -> None:
    """Runs a command as tasks; its status is the largest of theirs."""
    start = arguments.index(sys.executable)  # submitit starts tasks by the Python that submitted
    output = arguments[arguments.index("--output") + 1]
    per_node, num_nodes = int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ["SLURM_NNODES"])
    array, tasks = os.environ.get("SLURM_ARRAY_TASK_ID"), []
    job = jobs / "_".join(filter(None, [os.environ["SLURM_JOB_ID"], array]))
    for rank in range(num_nodes * per_node):
        node, local = divmod(rank, per_node)
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node}
        place["SLURM_NTASKS"] = num_nodes * per_node
        environment = os.environ | {name: str(value) for name, value in place.items()}
        path = output.replace("%j", job.name).replace("%A_%a", job.name).replace("%t", str(rank))
        with open(path, "a") as file:
            tasks.append(subprocess.Popen(arguments[start:], env=environment, stdout=file, stderr=file))
        (job / f"task-{rank}").write_text(str(tasks[-1].pid))
    statuses = [task.wait() for task in tasks]
    sys.exit(max(status if status >= 0 else 128 - status for status in statuses))


def _scontrol(jobs: Path, arguments: list[str]) -> None:
    verb, job_id = arguments
    assert verb == "requeue", verb
    (jobs / job_id / "requeue").touch()


def _sacct(jobs: Path, arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for job in sorted(jobs.glob("1*")):
        state = (job / "state").read_text().split()[0] if (job / "state").exists() else "RUNNING"
        print(f"{job.name}|{state}|localhost")


if __name__ == "__main__":
    jobs = Path(os.environ["FAKE_SLURM"])
    command = {"sbatch": _sbatch, "run": _run, "srun": _srun, "scontrol": _scontrol, "sacct": _sacct}[sys.argv[1]]
    command(jobs, sys.argv[2:])
