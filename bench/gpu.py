"""Run every GPU benchmark that fits into a number of minutes, the most valuable first.

    python -m bench.gpu --minutes 30
    python -m bench.gpu --minutes 7 --only smoke,dry_run,step,peers

Each stage is a command with a minimum time and a time limit. It is skipped if too little time is left or its data is
missing, gets SIGTERM at its limit, and SIGKILL if it does not exit then. $OUT (default: bench/results/gpu) receives
results.jsonl, with a line per stage and per check of the smoke stage; log.txt, with the output of all stages; and
measured.tar.gz, rewritten after each stage: results, curves and samples, without the weights. Later stages do not use
what the smoke stage finds broken. Without a GPU all stages run at toy size on random data.
"""
import contextlib
import ctypes
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import split

import torch

from bench.common import OUT, append_result
from bench.toy import write_toy_data
from exactgpt.config import UserError, flag, parse_config, run_script, with_changes
from exactgpt.tokenizer import default_tokenizer
from hellaswag import DATA_FILE

GRACE_S = 20        # from SIGTERM, at which train.py saves a checkpoint, to SIGKILL
MARGIN_S = 25       # time that each stage must leave, for GRACE_S and for writing the archive
TOKENS_PER_STEP = 524288
WIKIPEDIA_TOKENS = 46_998_597      # train tokens, one epoch


def scratch_folder():
    """Return the default --work folder: the one of an earlier call, else /dev/shm if a checkpoint fits, else /tmp.

    Nobody keeps the checkpoints written there, so memory will do.
    """
    memory, disk = (Path(folder) / "exactgpt_gpu" for folder in ("/dev/shm", tempfile.gettempdir()))
    if memory.exists() or disk.exists():
        return memory if memory.exists() else disk
    has_room = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free > 8e9
    return memory if has_room else disk


@dataclass(kw_only=True)
class GpuConfig:
    """The flags of this script."""
    minutes: float = flag(30.0, "time limit for all stages together, in minutes", above=0)
    only: str = flag("", "stages to run, separated by commas: unpack, smoke, dry_run, step, peers, run, plot, samples, "
                         "generate, hellaswag, medium, xl, group, shakespeare (default: all but the last)")
    epochs: int = flag(0, "epochs of Wikipedia in the stage run (0: as many as the time allows, up to 4)", low=0)
    data: str = flag("data", "folder that contains wikipedia_48m, hellaswag and tinyshakespeare, or packed, which "
                             "bench.pack makes")
    work: str = flag("", "folder for files that one stage leaves to the next; use the same one in a second call "
                         "(default: exactgpt_gpu in /dev/shm or in the temporary folder)")
    tokenizer: str = flag("", "folder with vocab.bpe and encoder.json (default: DATA/wikipedia_48m, if it has them)")

    def check(self):
        """Raise UserError if --only names an unknown stage."""
        unknown = [name for name in self.requested_stages() if name not in TOY_FLAGS]
        if unknown:
            raise UserError(f"--only: there is no stage {unknown[0]}; the stages are {', '.join(TOY_FLAGS)}")

    def requested_stages(self):
        """Return the names of the stages in --only."""
        return [name.strip() for name in self.only.split(",")] if self.only else []


@dataclass(frozen=True)
class Stage:
    """A command, its time limits and its requirements."""
    name: str
    min_s: float                  # skipped if less time than this is left, seconds
    max_s: float                  # time limit, seconds
    arguments: list               # of the command, after `python`
    needs: Path | None = None     # a file or folder that must exist
    fallbacks: str = ""           # which of the smoke stage's fallback flags it understands: "train" or "write"
    on_request: bool = False      # only runs if --only names it


def main(argv=None):
    """Run the stages that fit into --minutes."""
    config = parse_config(GpuConfig, argv, __doc__.split("\n\n")[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that `finally` ends the running stage
    end = time.monotonic() + 60 * config.minutes
    on_gpu = torch.cuda.is_available()
    work = Path(config.work or scratch_folder())
    if not on_gpu:
        work = work / "toy"                                # a later run on a GPU must not resume from toy files
    config = with_changes(config, work=str(work))
    work.mkdir(parents=True, exist_ok=True)
    if not on_gpu:
        write_toy_data(work / "data", default_tokenizer(config.tokenizer))
        print("no CUDA device: running all stages at toy size on random data; the figures mean nothing", flush=True)
    for i in range(len(make_stages(config, on_gpu))):
        stage = make_stages(config, on_gpu)[i]      # made again each time: "unpack" adds files that change the others
        if stage.name in config.requested_stages() or not (config.only or stage.on_request):
            run_stage(stage, end - time.monotonic() - MARGIN_S, work)
            write_archive(work, "results" if on_gpu else "toy_results")
    print(f"{OUT} contains results.jsonl, log.txt and measured.tar.gz; unpack the last one in bench/")


def run_stage(stage, time_left, work):
    """Run a stage with the fallbacks that the smoke stage found, or skip it; append the result to results.jsonl."""
    if stage.needs and not stage.needs.exists():
        append_result(stage=stage.name, skipped=f"{stage.needs} does not exist")
        return
    if time_left < stage.min_s:
        append_result(stage=stage.name, skipped=f"{max(0, time_left):.0f} s left, {stage.min_s:.0f} needed")
        return
    limit = min(time_left, stage.max_s)
    print(f"{stage.name}: up to {limit:.0f} s ...", flush=True)
    n_results = len(read_results())
    rc, seconds = run_command([sys.executable, *stage_arguments(stage, limit, work)], limit, stage.name, {
        **read_fallbacks(work).get("env", {}), "BENCH_RESULTS": str(work / "results"), "OUT": str(OUT.resolve())})
    if stage.name == "smoke":
        save_fallbacks(read_results()[n_results:], work)
    stopped = dict(stopped="at its time limit") if seconds >= limit else {}
    append_result(stage=stage.name, rc=rc, seconds=round(seconds, 1), **stopped,
                  time=datetime.datetime.now().isoformat(timespec="seconds"))
    if rc:
        last_lines = (OUT / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        print(f"{stage.name} failed; its last lines of output (all of it: {OUT / 'log.txt'}):", *last_lines,
              sep="\n    ", flush=True)


def stage_arguments(stage, limit, work):
    """Return the arguments after `python`: the stage's, the number of epochs if it is open, and fallback flags."""
    is_open = stage.name == "run" and "--num_epochs" not in stage.arguments
    length = ["--num_epochs", str(choose_epochs(limit, work))] if is_open else []
    return [*stage.arguments, *length, *read_fallbacks(work).get(stage.fallbacks, [])]


def run_command(command, limit, name, env):
    """Run a command with its output in log.txt; return (exit status, seconds).

    After `limit` seconds it gets SIGTERM, GRACE_S later SIGKILL. No process that it started survives it.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(OUT / "log.txt", "ab", buffering=0) as log:
        log.write(f"\n===== {name}: {' '.join(command)}\n".encode())
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=die_with_parent, env={**os.environ, "PYTHONUNBUFFERED": "1", **env})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()               # not its group: it still needs its compile workers while it saves
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):      # a process stuck in a driver may survive SIGKILL
                process.wait(10)
    return process.returncode, time.monotonic() - start


def die_with_parent():
    """Ask Linux to kill this process when its parent ends, for whatever reason."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)     # 1: PR_SET_PDEATHSIG


def read_results():
    """Return the lines of results.jsonl as dicts; skip incomplete lines, which a killed stage may leave."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(OUT / "results.jsonl", encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def save_fallbacks(results, work):
    """Merge the fallbacks in the smoke stage's results and save them for later stages, of this call and the next."""
    merged = dict(train=[], write=[], env={})
    for fallback in (result.get("fallback", {}) for result in results):
        merged["env"].update(fallback.get("env", {}))
        for kind in ("train", "write"):
            merged[kind] += fallback.get(kind, [])
    (work / "fallbacks.json").write_text(json.dumps(merged))


def read_fallbacks(work):
    """Return the last smoke stage's fallbacks, {"train": flags, "write": flags, "env": {name: value}}, or {}."""
    path = work / "fallbacks.json"
    return json.loads(path.read_text()) if path.exists() else {}


def choose_epochs(seconds, work):
    """Return how many epochs of Wikipedia, 1 to 4, fit into some seconds at the speed that the stage "step" measured.

    A run that an earlier call has started keeps its number.
    """
    chosen = work / "epochs"
    if chosen.exists() and (work / "logs" / "wikipedia").exists():
        return int(chosen.read_text())
    measured = work / "results" / "train_step_cuda_gpt2_1_profile.json"
    rate = json.loads(measured.read_text())["tokens_per_s"]["ours"][0] if measured.exists() else 400_000
    n = max(1, min(4, int((seconds - 90) * rate / WIKIPEDIA_TOKENS)))       # 90 s: start, compilation, evaluations
    chosen.write_text(str(n))
    return n


def write_archive(work, folder):
    """Pack results, metrics, logs and plots, without the weights, into measured.tar.gz, to be unpacked in bench/."""
    names = {path: f"{folder}/{path.name}" for path in work.glob("results/*.json")}
    names.update({path: f"{folder}/{path.parent.name}_gpu/{path.name}" for pattern in ("*.jsonl", "log.txt", "*.png")
                  for path in work.glob(f"logs/*/{pattern}")})
    OUT.mkdir(parents=True, exist_ok=True)
    archive = OUT / "measured.tar.gz"
    with tarfile.open(f"{archive}.tmp", "w:gz") as tar:
        for path, name in names.items():
            tar.add(path, name)
    os.replace(f"{archive}.tmp", archive)


def make_stages(config, on_gpu):
    """Return all Stages, the most valuable first; without a GPU the same commands with flags for toy size."""
    work = Path(config.work)
    data, logs = Path(config.data) if on_gpu else work / "data", work / "logs"
    wikipedia, hellaswag = data / "wikipedia_48m", data / "hellaswag" / "hellaswag_val.jsonl"
    tokenizer = config.tokenizer or (str(wikipedia) if (wikipedia / "vocab.bpe").exists() else "")
    vocabulary = ["--tokenizer", tokenizer] if tokenizer else []
    # --micro_batch_size 0: the largest that fits this GPU, up to 64.
    step = ["-m", "bench.train_step", *vocabulary, *split("--block_size 1024 --micro_batch_size 0 --rounds 2")]
    ours = [*step, "--peers", "ours"]
    full = ["--total_batch_size", str(TOKENS_PER_STEP)]
    train = ["train.py", "--data_dir", str(wikipedia), "--log_dir", str(logs / "wikipedia"), *vocabulary,
             *split("--warmup_steps 40 --eval_every 30 --val_tokens 983040 --sample_every 60 --checkpoint_every 0"),
             "--hellaswag_every", "179" if Path(DATA_FILE).exists() else "0"]
    length = ["--num_epochs", str(config.epochs)] if config.epochs else []
    shakespeare = ["train.py", "--data_dir", str(data / "tinyshakespeare"), "--log_dir", str(logs / "shakespeare"),
                   *split("--block_size 64 --total_batch_size 4096 --micro_batch_size 16 --max_steps 10000 "
                         "--stop_loss 0.09 --eval_every 250 --val_tokens 16384 --hellaswag_every 0 --sample_every 500 "
                         "--checkpoint_every 0")]
    write = ["inference.py", "--checkpoint", str(logs / "wikipedia"), *vocabulary]
    everything = [
        Stage("unpack", 5, 60, ["-m", "bench.pack", "--unpack", "--data", str(data)], data / "packed"),
        Stage("smoke", 100, 180, ["-m", "bench.gpu_smoke", *vocabulary]),
        Stage("dry_run", 95, 180, [*train, "--num_epochs", "4", "--dry_run"], wikipedia, "train"),
        Stage("step", 60, 120, [*ours, *full, "--profile"], fallbacks="train"),
        Stage("peers", 90, 200, [*step, *full, "--steps", "1"], fallbacks="train"),
        Stage("run", 200, 600, [*train, *length], wikipedia, "train"),
        Stage("plot", 5, 60, ["plot.py", str(logs / "wikipedia")], logs / "wikipedia" / "metrics.jsonl"),
        Stage("samples", 20, 60, [*write, "--prompt", "The history of", "--num_seq", "3"], logs / "wikipedia", "write"),
        Stage("generate", 65, 150, ["-m", "bench.generate"], fallbacks="write"),
        Stage("hellaswag", 30, 120, ["-m", "bench.hellaswag", *vocabulary, "--data", str(hellaswag), "--repeats", "1"],
              hellaswag),
        Stage("medium", 75, 200, [*ours, *full, "--model", "gpt2-medium", "--steps", "1"], fallbacks="train"),
        Stage("xl", 240, 420, [*ours, "--total_batch_size", "131072", "--model", "gpt2-xl", "--steps", "1"],
              fallbacks="train"),
        Stage("group", 60, 120, [*ours, *full, "--process_group"], fallbacks="train"),
        Stage("shakespeare", 120, 600, shakespeare, data / "tinyshakespeare", "train", on_request=True),
    ]
    return everything if on_gpu else [
        replace(stage, min_s=2, max_s=60, arguments=[*stage.arguments, *split(TOY_FLAGS[stage.name])])
        for stage in everything[1:]]      # not "unpack": the toy data is not packed


TOY_STEP = "--device cpu --dtype fp32 --n_layer 1 --block_size 16 --total_batch_size 32 --compile off --rounds 1 " \
           "--steps 1"
TOY_RUN = "--device cpu --dtype fp32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --total_batch_size 1024 " \
          "--warmup_steps 0 --val_tokens 64 --hellaswag_every 0"
TOY_FLAGS = dict(  # appended to the stage's own: if a flag is given twice, the last one counts
    unpack="", smoke="--device cpu --tokenizer=", dry_run=TOY_RUN, step=TOY_STEP, peers=TOY_STEP, run=TOY_RUN, plot="",
    samples="--device cpu --dtype fp32 --num_seq 1 --max_tokens 8",
    generate="--device cpu --dtype fp32 --n_layer 1 --batch_size 2 --prompt_tokens 4 --max_tokens 4 --rounds 1 "
             "--compile off",
    hellaswag="--device cpu --dtype fp32 --n_layer 1 --limit 2", medium=TOY_STEP, xl=TOY_STEP, group=TOY_STEP,
    shakespeare=f"{TOY_RUN} --max_steps 4")


if __name__ == "__main__":
    run_script(main)
