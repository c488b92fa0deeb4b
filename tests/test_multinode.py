"""Two nodes with one gloo process each: two network namespaces on this machine and a virtual cable that is pulled."""
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from torch.distributed.run import get_args_parser

from tests.common import ROOT, script_env
from tests.killed_runs import FLAGS, SCRIPT, SIZES, assert_same_run

ADDRESSES = ("10.231.77.1", "10.231.77.2")
TRAIN = (*FLAGS, "--dtype", "fp32")
SOON = ["--shutdown_timeout=3"] if "shutdown_timeout" in get_args_parser().parse_args(["x"]) else []    # torch 2.13


class Nodes:
    """Two network namespaces joined by a pair of virtual Ethernet cards, "node-0" and "node-1"."""

    def __init__(self, folder):
        self.folder, self.names = folder, [f"gpt2-{os.getpid()}-{i}" for i in (0, 1)]
        self.cards = [f"g{os.getpid()}-{i}" for i in (0, 1)]
        self._running = []

    def build(self):
        """Create namespaces and cable. Raises CalledProcessError without the permission."""
        ip(f"link add {self.cards[0]} type veth peer name {self.cards[1]}")
        for name, card, address in zip(self.names, self.cards, ADDRESSES):
            ip(f"netns add {name}")
            ip(f"link set {card} netns {name}")
            ip(f"-n {name} addr add {address}/24 dev {card}")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set {card} up")
            # Give a connection up after 13 s without an answer, not 15 minutes: torchrun waits until the kernel does.
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2"],
                           check=True, capture_output=True, text=True)

    def remove(self):
        for process in self._running:
            process.kill()
            process.wait()
        for name in self.names:     # deletes their network cards too
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.cards[0]], capture_output=True)

    def cable(self, state):
        """Return the command that unplugs node 1's end of the cable ("down") or plugs it in ("up")."""
        return f"ip -n {self.names[1]} link set {self.cards[1]} {state}"

    def torchrun(self, *flags, port, launcher=(), **env):
        """Start torchrun on both nodes; return [Popen, Popen], each with its output in the file process.output."""
        words = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                 "--rdzv_id=test", f"--rdzv_endpoint=node-0:{port}", *SOON, *launcher, ROOT / SCRIPT, *flags]
        return [self._launch(i, words, env) for i in (0, 1)]

    def _launch(self, i, words, env):
        """Start a Python command on node i, which has its own host name and knows the other's address."""
        hosts = self.folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} node-{j}\n" for j, a in enumerate(ADDRESSES)))
        inside = (f"mount --bind {hosts} /etc/hosts; echo node-{i} > /proc/sys/kernel/hostname; "
                  f"exec {shlex.join([sys.executable, *map(str, words)])}")
        output = self.folder / f"node-{i}_{time.monotonic_ns()}.out"
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "--mount", "sh", "-c", inside], cwd=ROOT,
            env=script_env(self.folder, env), stdout=open(output, "w"), stderr=subprocess.STDOUT)
        process.output = output
        self._running.append(process)
        return process


def ip(words):
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes(tmp_path):
    """Two nodes on this machine; skips the test without permission to create namespaces."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("no iproute2 or no unshare here: no network namespaces")
    nodes = Nodes(tmp_path)
    try:
        nodes.build()
    except subprocess.CalledProcessError as error:
        nodes.remove()
        pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")
    yield nodes
    nodes.remove()


def end(processes, seconds):
    """Wait for processes, which must end in time; return their exit statuses and outputs."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    outputs = [process.output.read_text() for process in processes]
    assert all(process.poll() is not None for process in processes), "\n".join(outputs)
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_a_run_survives_a_cut_cable_and_killed_workers_unchanged(make_shards, nodes, undisturbed):
    """The cable is pulled before step 6 and both nodes exit. With the cable back the run resumes; a worker is killed on
    each node, and torchrun, which counts restarts per node, restarts both."""
    folder = make_shards(SIZES, val_sizes=[120])
    reference, log_dir = undisturbed(folder, 2, "--dtype", "fp32"), nodes.folder / "logs"
    flags = (*TRAIN, "--data_dir", folder, "--log_dir", log_dir, "--timeout", 3)
    statuses, outputs = end(nodes.torchrun(*flags, port=29411, ACCIDENT="run:step:6:0",
                                           ACCIDENT_COMMAND=nodes.cable("down")), 90)
    assert all(statuses), outputs
    assert "rank 1 on node-1 without an answer" in outputs[0] and "rank 0 on node-0 without an answer" in outputs[1]
    assert "no progress for 3 s" in outputs[0] and "Traceback" not in outputs[0].split("failed (exitcode")[0]
    subprocess.run(shlex.split(nodes.cable("up")), check=True)
    statuses, outputs = end(nodes.torchrun(
        *flags, port=29412, launcher=["--max_restarts=3"], ACCIDENT="kill:step:7:1,kill:step:10:0",
        ACCIDENT_ONCE=str(nodes.folder / "happened")), 120)
    assert statuses == [0, 0] and (nodes.folder / "happened").read_text() == "xx", outputs
    assert "resuming from step 4" in outputs[0] + outputs[1]
    assert_same_run(reference, log_dir)


@pytest.mark.slow
def test_the_rank_that_hangs_is_named(train_ranks, make_shards, tmp_path):
    codes, out = train_ranks(2, "--data_dir", make_shards(SIZES), "--eval_every", 0, "--log_dir", tmp_path / "logs",
                             "--timeout", 2, ACCIDENT="hang:step:6:1", ACCIDENT_SECONDS=14)
    said = re.search(r"error on (\S+), rank 0: no progress for 2 s: (.*)", out)
    assert codes == [1, 1] and said, out
    assert re.fullmatch(rf"rank 1 on {re.escape(said[1])} at train\.py:\d+ in loop; rank 0 on \S+ at "
                        r"train\.py:\d+ in train_step", said[2]), said[0]
    assert "Traceback" not in out
