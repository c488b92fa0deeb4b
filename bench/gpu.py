"""Measure a rented card within the minutes that were paid for: every stage in order of worth, none of which can hang.

    python -m bench.gpu --minutes 30
    python -m bench.gpu --minutes 7 --only smoke,dry_run,step,peers

A stage is a command with a shortest useful time and a time limit. It is skipped if the time left is too short or its
data is not there, asked to stop at its limit, and killed if it does not. $OUT (default: bench/results/gpu) gets
results.jsonl, a line a stage and a line a check of the smoke stage; log.txt, all that the stages print; and, renewed
after each stage, measured.tar.gz: results, curves and samples, without the weights. Later stages run without whatever
the smoke stage finds wrong. Without a card all stages run at toy size on made-up data.
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

from bench.common import OUT, record
from bench.toy import make_toy_data
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.tokenizer import default_tokenizer
from hellaswag import DATA_FILE

GRACE_S = 20        # from the request to stop, which train.py answers with a checkpoint, to the kill
MARGIN_S = 25       # that a stage leaves, for this and for the archive
TOKENS = 524288     # of a training step
WIKIPEDIA_TOKENS = 46_998_597      # of an epoch


def fast_folder():
    """Where checkpoints go that nobody keeps: where an earlier call left them, else memory that holds one, or disk."""
    memory, disk = (Path(folder) / "exactgpt_gpu" for folder in ("/dev/shm", tempfile.gettempdir()))
    if memory.exists() or disk.exists():
        return memory if memory.exists() else disk
    has_room = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free > 8e9
    return memory if has_room else disk


@dataclass(kw_only=True)
class GpuConfig:
    """The flags of this script."""
    minutes: float = flag(30.0, "time for all stages together", above=0)
    only: str = flag("", "some of the stages unpack, smoke, dry_run, step, peers, run, plot, samples, generate, "
                         "hellaswag, medium, xl, group, shakespeare, separated by commas (default: all but the last)")
    epochs: int = flag(0, "of Wikipedia, in the stage run (0: as many as there is time for, up to 4)", low=0)
    data: str = flag("data", "folder with wikipedia_48m, hellaswag and tinyshakespeare, or with packed (bench.pack)")
    work: str = flag("", "folder for what the stages hand on; give the same one to a second call (default: one in "
                         "memory or the temporary folder)")
    tokenizer: str = flag("", "folder with vocab.bpe and encoder.json (default: DATA/wikipedia_48m, if it has them)")

    def check(self):
        """Raise UserError for a stage that is none; choose the folder."""
        self.work = self.work or str(fast_folder())
        unknown = [name for name in self.names() if name not in TOY]
        if unknown:
            raise UserError(f"--only knows {', '.join(TOY)}, not {unknown[0]}")

    def names(self):
        """The stages that --only asks for."""
        return [name.strip() for name in self.only.split(",")] if self.only else []


@dataclass(frozen=True)
class Stage:
    """A command, and what it needs."""
    name: str
    least: float                  # seconds, without which it is not begun
    most: float                   # seconds, after which it is stopped
    words: list                   # of the command, after `python`
    needs: Path | None = None     # a file or folder
    takes: str = ""               # whose fall-backs it takes: "train" or "write"
    on_request: bool = False


def main(argv=None):
    """Run the stages for which there is time."""
    config = parse_config(GpuConfig, argv, __doc__.split("\n\n")[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # `finally` ends the stage that runs
    end = time.monotonic() + 60 * config.minutes
    on_card = torch.cuda.is_available()
    if not on_card:
        config.work = str(Path(config.work) / "toy")       # never what a run on a card goes on from
    work = Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    if not on_card:
        make_toy_data(work / "data", default_tokenizer(config.tokenizer))
        print("no CUDA device: all stages at toy size, on made-up data; the figures mean nothing", flush=True)
    for i in range(len(stages(config, on_card))):
        stage = stages(config, on_card)[i]      # as things are now: what "unpack" has brought is there
        if stage.name in config.names() or not (config.only or stage.on_request):
            attempt(stage, end - time.monotonic() - MARGIN_S, work)
            collect(work, "results" if on_card else "toy_results")
    print(f"{OUT}: results.jsonl, log.txt, and measured.tar.gz, to be unpacked in bench/")


def attempt(stage, left, work):
    """Run a stage if it can be, without what the smoke stage found wrong, and record what became of it."""
    if stage.needs and not stage.needs.exists():
        record(stage=stage.name, skipped=f"{stage.needs} is not there")
        return
    if left < stage.least:
        record(stage=stage.name, skipped=f"{max(0, left):.0f} s left, {stage.least:.0f} needed")
        return
    limit = min(left, stage.most)
    print(f"{stage.name}: up to {limit:.0f} s ...", flush=True)
    n_lines = len(recorded())
    rc, seconds = run([sys.executable, *words_of(stage, limit, work)], limit, stage.name, {
        **read_fallbacks(work).get("env", {}), "BENCH_RESULTS": str(work / "results"), "OUT": str(OUT.resolve())})
    if stage.name == "smoke":
        keep_fallbacks(recorded()[n_lines:], work)
    stopped = dict(stopped="its time was up") if seconds >= limit else {}
    record(stage=stage.name, rc=rc, seconds=round(seconds, 1), **stopped,
           time=datetime.datetime.now().isoformat(timespec="seconds"))
    if rc:
        last = (OUT / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        print(f"the end of what {stage.name} printed (all of it: {OUT / 'log.txt'}):", *last, sep="\n    ", flush=True)


def words_of(stage, limit, work):
    """A stage's command after `python`, with what the smoke stage and the time left add to it."""
    open_ended = stage.name == "run" and "--num_epochs" not in stage.words
    length = ["--num_epochs", str(epochs(limit, work))] if open_ended else []
    return [*stage.words, *length, *read_fallbacks(work).get(stage.takes, [])]


def run(command, limit, name, env):
    """(exit status, seconds) of a command, its output in log.txt; after `limit` seconds SIGTERM, then SIGKILL.

    Nothing that it started outlives it.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(OUT / "log.txt", "ab", buffering=0) as log:
        log.write(f"\n===== {name}: {' '.join(command)}\n".encode())
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=die_with_parent, env={**os.environ, "PYTHONUNBUFFERED": "1", **env})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()               # this process alone: it saves while its compile workers still live
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):      # one that the kernel cannot end, deep in a driver
                process.wait(10)
    return process.returncode, time.monotonic() - begun


def die_with_parent():
    """Ask Linux to end this process when the one that started it ends, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)     # 1: PR_SET_PDEATHSIG


def recorded():
    """The lines of results.jsonl, as dicts; a stage that was killed may have left half of one."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(OUT / "results.jsonl", encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def keep_fallbacks(lines, work):
    """Put together for later stages, of this call and the next, what the smoke stage's lines say to do without."""
    together = dict(train=[], write=[], env={})
    for fallback in (line.get("fallback", {}) for line in lines):
        together["env"].update(fallback.get("env", {}))
        for kind in ("train", "write"):
            together[kind] += fallback.get(kind, [])
    (work / "fallbacks.json").write_text(json.dumps(together))


def read_fallbacks(work):
    """{"train": flags, "write": flags, "env": {name: value}} as the last smoke stage left them."""
    path = work / "fallbacks.json"
    return json.loads(path.read_text()) if path.exists() else {}


def epochs(seconds, work):
    """The epochs of Wikipedia that fit into some seconds, 1 to 4, at the rate that the stage "step" measured.

    A run that an earlier call has begun keeps its length.
    """
    chosen = work / "epochs"
    if chosen.exists() and (work / "logs" / "wikipedia").exists():
        return int(chosen.read_text())
    measured = work / "results" / "train_step_cuda_gpt2_1_profile.json"
    rate = json.loads(measured.read_text())["tokens_per_s"]["ours"][0] if measured.exists() else 400_000
    n = max(1, min(4, int((seconds - 90) * rate / WIKIPEDIA_TOKENS)))       # 90 s: start, compilation, evaluations
    chosen.write_text(str(n))
    return n


def collect(work, folder):
    """Renew the archive of what was measured, as it goes into bench/: small files, not the weights."""
    named = {path: f"{folder}/{path.name}" for path in work.glob("results/*.json")}
    named.update({path: f"{folder}/{path.parent.name}_gpu/{path.name}" for pattern in ("*.jsonl", "log.txt", "*.png")
                  for path in work.glob(f"logs/*/{pattern}")})
    OUT.mkdir(parents=True, exist_ok=True)
    archive = OUT / "measured.tar.gz"
    with tarfile.open(f"{archive}.tmp", "w:gz") as tar:
        for path, name in named.items():
            tar.add(path, name)
    os.replace(f"{archive}.tmp", archive)


def stages(config, on_card):
    """All Stages, the most valuable first; without a card the same commands, with flags that make them small."""
    work = Path(config.work)
    data, logs = Path(config.data) if on_card else work / "data", work / "logs"
    wikipedia, hellaswag = data / "wikipedia_48m", data / "hellaswag" / "hellaswag_val.jsonl"
    tokenizer = config.tokenizer or (str(wikipedia) if (wikipedia / "vocab.bpe").exists() else "")
    vocabulary = ["--tokenizer", tokenizer] if tokenizer else []
    # A micro-batch of 0 rows is the largest that fits this card, up to 64.
    step = ["-m", "bench.train_step", *vocabulary, *split("--block_size 1024 --micro_batch_size 0 --rounds 2")]
    ours = [*step, "--peers", "ours"]
    full = ["--total_batch_size", str(TOKENS)]
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
        Stage("step", 60, 120, [*ours, *full, "--profile"], takes="train"),
        Stage("peers", 90, 200, [*step, *full, "--steps", "1"], takes="train"),
        Stage("run", 200, 600, [*train, *length], wikipedia, "train"),
        Stage("plot", 5, 60, ["plot.py", str(logs / "wikipedia")], logs / "wikipedia" / "metrics.jsonl"),
        Stage("samples", 20, 60, [*write, "--prompt", "The history of", "--num_seq", "3"], logs / "wikipedia", "write"),
        Stage("generate", 65, 150, ["-m", "bench.generate"], takes="write"),
        Stage("hellaswag", 30, 120, ["-m", "bench.hellaswag", *vocabulary, "--data", str(hellaswag), "--repeats", "1"],
              hellaswag),
        Stage("medium", 75, 200, [*ours, *full, "--model", "gpt2-medium", "--steps", "1"], takes="train"),
        Stage("xl", 240, 420, [*ours, "--total_batch_size", "131072", "--model", "gpt2-xl", "--steps", "1"],
              takes="train"),
        Stage("group", 60, 120, [*ours, *full, "--process_group"], takes="train"),
        Stage("shakespeare", 120, 600, shakespeare, data / "tinyshakespeare", "train", on_request=True),
    ]
    return everything if on_card else [replace(stage, least=2, most=60, words=[*stage.words, *split(TOY[stage.name])])
                                       for stage in everything[1:]]      # made-up data lies there unpacked


TOY_STEP = "--device cpu --dtype fp32 --n_layer 1 --block_size 16 --total_batch_size 32 --compile off --rounds 1 " \
           "--steps 1"
TOY_RUN = "--device cpu --dtype fp32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --total_batch_size 1024 " \
          "--warmup_steps 0 --val_tokens 64 --hellaswag_every 0"
TOY = dict(  # the last of two equal flags counts
    unpack="", smoke="--device cpu --tokenizer=", dry_run=TOY_RUN, step=TOY_STEP, peers=TOY_STEP, run=TOY_RUN, plot="",
    samples="--device cpu --dtype fp32 --num_seq 1 --max_tokens 8",
    generate="--device cpu --dtype fp32 --n_layer 1 --batch_size 2 --prompt_tokens 4 --max_tokens 4 --rounds 1 "
             "--compile off",
    hellaswag="--device cpu --dtype fp32 --n_layer 1 --limit 2", medium=TOY_STEP, xl=TOY_STEP, group=TOY_STEP,
    shakespeare=f"{TOY_RUN} --max_steps 4")


if __name__ == "__main__":
    run_script(main)
