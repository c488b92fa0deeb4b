"""Two nodes: network namespaces of this machine, a cable between them that is pulled, one process on each (gloo)."""
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, script_env
from test_resume import CHAOS, FLAGS, SIZES, assert_same_end, assert_same_logs, command

ADDRESSES = ("10.231.77.1", "10.231.77.2")
TRAIN = (*FLAGS, "--dtype", "fp32")


class Nodes:
    """Two network namespaces joined by a pair of virtual Ethernet cards, "node-0" and "node-1"."""

    def __init__(self, folder):
        self.folder, self.names = folder, [f"gpt2-{os.getpid()}-{i}" for i in (0, 1)]
        self.cards = [f"g{os.getpid()}-{i}" for i in (0, 1)]
        self._running = []

    def build(self):
        """Raises CalledProcessError without the rights."""
        ip(f"link add {self.cards[0]} type veth peer name {self.cards[1]}")
        for name, card, address in zip(self.names, self.cards, ADDRESSES):
            ip(f"netns add {name}")
            ip(f"link set {card} netns {name}")
            ip(f"-n {name} addr add {address}/24 dev {card}")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set {card} up")

    def remove(self):
        for process in self._running:
            process.kill()
            process.wait()
        for name in self.names:     # and their cards with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.cards[0]], capture_output=True)

    def cable(self, state):
        """The command that pulls node 1's end of the cable ("down") or puts it back ("up")."""
        return f"ip -n {self.names[1]} link set {self.cards[1]} {state}"

    def torchrun(self, *flags, port, launcher=(), **env):
        """torchrun on both nodes: [Popen, Popen], the output of each in the file process.output."""
        return [self._launch(i, [*launcher, f"--rdzv_endpoint={ADDRESSES[0]}:{port}", CHAOS, *flags], env)
                for i in (0, 1)]

    def _launch(self, i, words, env):
        inside = ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c",
                  f"echo node-{i} > /proc/sys/kernel/hostname; exec {shlex.join(map(str, self._torchrun(i, words)))}"]
        output = self.folder / f"node-{i}_{time.monotonic_ns()}.out"
        env = script_env(self.folder, {"GLOO_SOCKET_IFNAME": self.cards[i], **env})
        process = subprocess.Popen(inside, cwd=ROOT, env=env, stdout=open(output, "w"), stderr=subprocess.STDOUT)
        process.output = output
        self._running.append(process)
        return process

    @staticmethod
    def _torchrun(i, words):
        return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                "--rdzv_backend=c10d", "--rdzv_id=test", f"--local_addr={ADDRESSES[i]}", "--shutdown_timeout=3", *words]


def ip(words):
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes(tmp_path):
    """Two nodes of this machine; skipped where namespaces may not be made."""
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


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(run, folder) -> the log_dir of an undisturbed run of two processes on one node."""
    done = []

    def undisturbed(run, folder):
        if not done:
            log_dir = tmp_path_factory.mktemp("reference")
            rc, _, err = run(*command(2, "--dtype", "fp32", "--data_dir", folder, "--log_dir", log_dir))
            assert rc == 0, err
            done.append(log_dir)
        return done[0]
    return undisturbed


def end(processes, seconds):
    """The exit statuses and outputs of processes, which must end in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    outputs = [process.output.read_text() for process in processes]
    assert all(process.poll() is not None for process in processes), "\n".join(outputs)
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_a_cut_cable_ends_both_nodes_and_the_restarted_run_ends_as_if_undisturbed(run, make_shards, nodes, reference):
    folder = make_shards(SIZES, val_sizes=[120])
    flags = (*TRAIN, "--data_dir", folder, "--log_dir", nodes.folder / "cut", "--timeout", 3)
    started = nodes.torchrun(*flags, port=29411, launcher=["--rdzv_conf", "read_timeout=20"],
                             ACCIDENT="run:step:6:0", ACCIDENT_COMMAND=nodes.cable("down"))
    statuses, outputs = end(started, 90)
    assert all(statuses), outputs
    assert "rank 1 on node-1 gives no answer" in outputs[0] and "rank 0 on node-0 gives no answer" in outputs[1]
    assert "no progress for 3 s" in outputs[0] and "Traceback" not in outputs[0].split("torch.distributed.elastic")[0]
    subprocess.run(shlex.split(nodes.cable("up")), check=True)
    statuses, outputs = end(nodes.torchrun(*flags, port=29412), 90)
    assert statuses == [0, 0], outputs
    assert "going on from step 4" in outputs[0] + outputs[1]
    assert_same_end(reference(run, folder), nodes.folder / "cut")
    assert_same_logs(reference(run, folder), nodes.folder / "cut")


@pytest.mark.slow
def test_a_worker_killed_on_either_node_is_restarted_on_both(run, make_shards, nodes, reference):
    """torchrun counts the restarts of each node by itself; the processes meet all the same."""
    folder = make_shards(SIZES, val_sizes=[120])
    flags = (*TRAIN, "--data_dir", folder, "--log_dir", nodes.folder / "killed")
    statuses, outputs = end(nodes.torchrun(
        *flags, port=29413, launcher=["--max_restarts=3"], ACCIDENT="kill:step:3:1,kill:step:6:0,kill:step:9:1",
        ACCIDENT_ONCE=str(nodes.folder / "happened")), 120)
    assert statuses == [0, 0] and (nodes.folder / "happened").read_text() == "xxx", outputs
    assert_same_end(reference(run, folder), nodes.folder / "killed")
    assert_same_logs(reference(run, folder), nodes.folder / "killed")


@pytest.mark.slow
def test_the_rank_that_hangs_is_named(run, make_shards, tmp_path):
    launched = command(2, "--data_dir", make_shards(SIZES), "--eval_every", 0, "--log_dir", tmp_path / "logs",
                       "--timeout", 2)
    launched.insert(3, "--shutdown_timeout=1")
    rc, _, err = run(*launched, env={"ACCIDENT": "hang:step:6:1"}, timeout=90)
    said = re.search(r"error on (\S+), rank 0: no progress for 2 s: (.*)", err)
    assert rc != 0 and said, err
    assert re.fullmatch(rf"rank 1 on {re.escape(said[1])} is at train\.py:\d+ in loop; rank 0 on \S+ is at "
                        r"train\.py:\d+ in train_step", said[2]), said[0]
