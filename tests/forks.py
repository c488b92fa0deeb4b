"""Start scripts as forks of a process that has imported torch: one second per start instead of five.

Each fork has its own signals, environment, files and process group, and imports our modules itself. Only the imports
of libraries are shared.
"""
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from tests.common import ROOT

PRELOADED = ["torch._dynamo", "torch._inductor.config", "torch.distributed", "torch.nn.parallel", "torch.optim",
             "tiktoken"]


def start(script, arguments, env, output, errors=None, input=os.devnull, cwd=ROOT):
    """Start ROOT/script like `python script arguments`; return the multiprocessing.Process.

    env: the whole environment. output, errors, input: paths of files for the streams; errors None: to the output;
    output None: both are closed.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(str(ROOT / script), list(map(str, arguments)), {k: str(v) for k, v in env.items()},
                           output and str(output), output and str(errors or output), str(input), str(cwd)))
    process.start()
    return process


def start_ranks(n, script, arguments, env, output):
    """Start a script in n processes that form a process group, without torchrun; return the Processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    if n > 1:
        env = dict(env, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [dict(RANK=rank, LOCAL_RANK=rank) if n > 1 else {} for rank in range(n)]
    return [start(script, arguments, {**env, **rank}, output) for rank in ranks]


def run_ranks(n, script, arguments, env, output, timeout=None):
    """Run a script in n processes; return their exit codes, None for those still running at the timeout (seconds)."""
    ranks = start_ranks(n, script, arguments, env, output)
    deadline = time.monotonic() + (timeout or 0)
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()) if timeout else None)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def _run(script, arguments, env, output, errors, input, cwd):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    for number, path, flags in ((0, input, os.O_RDONLY), (1, output, append), (2, errors, append)):
        if path:
            os.dup2(os.open(path, flags, 0o644), number)
        else:
            os.close(number)
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.stderr = None
    if output:
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)
        sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)
    sys.argv = [script, *arguments]
    sys.path[:] = [str(Path(script).parent), str(ROOT), *(p for p in sys.path if p not in ("", str(ROOT)))]
    runpy.run_path(script, run_name="__main__")
