"""`deepspeed --hostfile` over two hosts, a rank killed, and resuming on fewer and on more processes; on one machine.

    python benchmarks/compatibility/two_hosts.py --stages 1 3 --out benchmarks/results/two_hosts

The hosts are two network namespaces joined by a virtual cable, each with an address, a loopback and an ssh daemon of
its own; nothing else is a stand-in: DeepSpeed's launcher on the first reads the hostfile and starts its processes by
pdsh and ssh on both. Without pdsh and sshd (apt-get install pdsh openssh-server) the launcher is started on each
host by hand instead, which is its --no_ssh. Both use the same file system. For each ZeRO stage:

  1. two hosts, a process each; once --kill-after iterations are done, the second host's process gets SIGKILL
  2. the first host alone, one process, --resume latest, for two more iterations
  3. two hosts with two processes each, --resume latest, for two more

Needs Linux and root; where namespaces are not allowed it says so and exits with code 3. Writes OUT.csv and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import ROOT, print_summary, write_csv

_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CARD = "node0"  # the network card of either host
_TINY = {
    "prompts.num_prompts": 4,
    "prompts.images_per_prompt": 2,
    "rollout.micro_batch_size": 2,
    "update.micro_batch_size": 2,
    "evaluation.every": 0,
    "tracking.grid_every": 0,
    "tracking.tensorboard": "false",
    "checkpoint.every": 1,
}


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces, and what a launcher needs to start processes in them."""

    names: tuple[str, str]
    folder: Path
    launcher: str

    def inside(self, host: int) -> list[str]:
        """What makes a command run on that host."""
        return ["ip", "netns", "exec", self.names[host]]

    def pids(self, host: int) -> list[int]:
        """The ids of all processes on that host."""
        done = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]


def main() -> int:
    arguments = _parser().parse_args()
    reason = why_not()
    if reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 3
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder), chosen_launcher()) as hosts:
        for stage in arguments.stages:
            rows += kill_and_resume(hosts, stage, arguments)
    if arguments.out:
        write_csv(arguments.out.with_suffix(".csv"), rows)
    good = all(row["as_expected"] for row in rows)
    path = arguments.out.with_suffix(".json") if arguments.out else None
    print_summary({"launcher": chosen_launcher(), "as_expected": good, "runs": rows}, path)
    return 0 if good else 1


def why_not() -> str | None:
    """What keeps this machine from having two hosts."""
    if not shutil.which("ip"):
        return "the command ip (iproute2) is not installed"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def chosen_launcher() -> str:
    """pdsh where all of it is installed."""
    return "pdsh" if all(shutil.which(name) for name in ("pdsh", "ssh", "sshd", "ssh-keygen")) else "no_ssh"


@contextmanager
def two_hosts(folder: Path, launcher: str) -> Iterator[Hosts]:
    """Up while the context lasts; everything that runs on them then ends."""
    hosts = Hosts((f"first{os.getpid()}", f"second{os.getpid()}"), folder, launcher)
    try:
        # Two namespaces, joined by a pair of cards.
        for name in hosts.names:
            _ip("netns", "add", name)
        first, second = hosts.names
        _ip("-n", first, "link", "add", _CARD, "type", "veth", "peer", "name", _CARD, "netns", second)
        for name, address in zip(hosts.names, _ADDRESSES):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _CARD)
            for card in ("lo", _CARD):
                _ip("-n", name, "link", "set", card, "up")
        if launcher == "pdsh":
            _start_ssh(hosts)
        yield hosts
    finally:
        # End whatever runs there, then the hosts.
        for host, name in enumerate(hosts.names):
            if Path("/run/netns", name).exists():
                for pid in hosts.pids(host):
                    os.kill(pid, signal.SIGKILL)
                _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _start_ssh(hosts: Hosts) -> None:
    """A daemon on each host, which lets in whoever has the key that is made here."""
    key = hosts.folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    shutil.copy(key.with_suffix(".pub"), hosts.folder / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)
    daemon = hosts.folder / "sshd_config"
    lines = [f"HostKey {key}", f"AuthorizedKeysFile {hosts.folder}/authorized", "StrictModes no", "PidFile none"]
    daemon.write_text("\n".join([*lines, "PermitRootLogin yes", "UsePAM no", "PasswordAuthentication no", ""]))
    client = hosts.folder / "ssh_config"
    lines = [f"IdentityFile {key}", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR"]
    client.write_text("\n".join([*lines, ""]))
    for host in range(2):
        sshd = shutil.which("sshd") or ""
        subprocess.run([*hosts.inside(host), sshd, "-f", str(daemon)], check=True)


def kill_and_resume(hosts: Hosts, stage: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The three runs, a row each."""
    run_dir = hosts.folder / f"stage_{stage}"
    done = arguments.kill_after
    options = {**_TINY, "engine.zero_stage": stage, "run_dir": run_dir, "num_iterations": done + 100}

    # A process on each host, until the second one's is killed.
    first = _killed(hosts, _options(arguments.config, options), run_dir, done)
    rows = [{"zero_stage": stage, "what": "second host's process killed", "processes": 2, **first}]

    # Go on with fewer processes, then with more.
    for what, slots in (("resumed on the first host", (1,)), ("resumed on both hosts", (2, 2))):
        done = _num_lines(run_dir) + 2
        again = _options(arguments.config, {**options, "num_iterations": done, "resume": "latest"})
        rows.append({"zero_stage": stage, "what": what, "processes": sum(slots), **_finished(hosts, again, slots)})
        rows[-1]["as_expected"] = rows[-1]["exit_code"] == 0 and _num_lines(run_dir) == done
    for row in rows:
        print(row, file=sys.stderr)
    return rows


def _killed(hosts: Hosts, options: list[str], run_dir: Path, done: int) -> dict[str, Any]:
    """What the launcher does after the second host's process is gone; it should end by itself, with an error."""
    log = hosts.folder / f"{run_dir.name}_killed.log"

    # Kill the training process of the second host, once there is a checkpoint.
    launched = _launch(hosts, options, (1, 1), log)
    _wait_for(lambda: (run_dir / "checkpoints" / f"iteration_{done:06d}").is_dir(), launched, log)
    for pid in hosts.pids(1):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"train.py") for word in words) and b"deepspeed.launcher.launch" not in words:
            os.kill(pid, signal.SIGKILL)

    # Wait for the launcher, and read what it said.
    died = time.monotonic()
    codes = [process.wait(timeout=600) for process in launched]
    seconds = time.monotonic() - died
    text = log.read_text(errors="replace").replace(str(hosts.folder), "RUNS")
    said = [line for line in text.splitlines() if "error: " in line]
    row = {"exit_code": max(codes, key=abs), "seconds": round(seconds, 1), "said": said[-1] if said else ""}
    return {**row, "as_expected": all(codes) and seconds < 60 and bool(said)}


def _finished(hosts: Hosts, options: list[str], slots: tuple[int, ...]) -> dict[str, Any]:
    log = hosts.folder / f"on_{sum(slots)}.log"
    start = time.monotonic()
    codes = [process.wait(timeout=600) for process in _launch(hosts, options, slots, log)]
    seconds = round(time.monotonic() - start, 1)
    if any(codes):
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    return {"exit_code": max(codes, key=abs), "seconds": seconds, "said": ""}


def _launch(hosts: Hosts, options: list[str], slots: tuple[int, ...], log: Path) -> list[subprocess.Popen[bytes]]:
    """DeepSpeed's launcher with a hostfile: once where it starts the other host by itself, else on each host."""
    # The files that the launcher reads: hosts with their slots, and what their processes find in the environment.
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots={count}\n" for address, count in zip(_ADDRESSES, slots)))
    environment = {"GLOO_SOCKET_IFNAME": _CARD, "NCCL_SOCKET_IFNAME": _CARD, "DS_ACCELERATOR": "cpu"}
    environment["OMP_NUM_THREADS"] = "1"
    passed_on = hosts.folder / "deepspeed_env"  # ssh passes no environment on; the launcher does, from this file
    passed_on.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    environment |= {"DS_ENV_FILE": str(passed_on), "PDSH_SSH_ARGS_APPEND": f"-F {hosts.folder}/ssh_config"}

    # A launcher on the first host, or without ssh one on each.
    port = 29500 + (os.getpid() + len(list(hosts.folder.iterdir()))) % 1000
    common = ["--hostfile", str(hostfile), "--master_addr", _ADDRESSES[0], "--master_port", str(port)]
    modes = [["--no_ssh_check", "--force_multi"]]
    if hosts.launcher == "no_ssh":
        modes = [["--no_ssh", f"--node_rank={host}"] for host in range(len(slots))]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    environment = {**os.environ, **environment}
    started = []
    for host, mode in enumerate(modes):
        command = [*hosts.inside(host), sys.executable, deepspeed, *common, *mode, "rlcm_fast/train.py", *options]
        with log.open("ab") as file:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    return started


def _options(config: str, values: dict[str, Any]) -> list[str]:
    return ["--config", config, *(f"--{name}={value}" for name, value in values.items())]


def _num_lines(run_dir: Path) -> int:
    """The number of finished iterations; evaluation is off, so there is no other line."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return 1 + max(json.loads(line)["iteration"] for line in lines)


def _wait_for(happened: Any, launched: list[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        if any(process.poll() is not None for process in launched) or time.monotonic() > deadline:
            raise RuntimeError(f"the run did not come so far:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shapes/compressibility.yaml")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 3], help="ZeRO stages")
    parser.add_argument("--kill-after", type=int, default=2, help="finished iterations before the kill")
    parser.add_argument("--out", type=Path, help="path without ending; nothing is written without it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
