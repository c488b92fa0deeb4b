"""Every shell command of README.md and the docs is run, so that the pages cannot rot.

TABLE maps a command, as it stands on the page, to what is done with it here: Run with more flags that make it small
(the last of two equal flags counts), Probe a server, or Skip with the reason. A command that is not in it fails.
"""
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field

import pytest

from model import GPT, GPTConfig
from tests.common import ROOT, script_env, write_nanogpt_checkpoint, write_nanogpt_data

PROGRAMS = {"make", "pip", "python", "torchrun", "streamlit", "mlflow", "git", "cp", "cd", "hf", "sbatch", "docker"}
PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md", "examples/multinode.md",
         *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@dataclass
class Run:
    """Run the command in the reader's folder with more flags; files that must be there then."""
    more: str = ""
    writes: list = field(default_factory=list)


@dataclass
class Probe:
    """Start a server with more flags ({port} is a free one) and wait until its page answers."""
    more: str


@dataclass
class Skip:
    """Why the command is not run."""
    reason: str


TINY = "--device cpu --dtype fp32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --max_steps 2 --eval_every 1 " \
       "--val_tokens 64 --sample_every 0 --hellaswag_every 0 --total_batch_size 128 --micro_batch_size 2"
INSTALLS = Skip("installs what this test runs with")
GPU = Skip("test_gpu.py runs it, at toy size")
CLUSTER = Skip("needs a cluster; test_examples.py runs the script, test_multinode.py two nodes")
ACCOUNT = Skip("needs an account of the hub")
TUNED = "--device cpu --dtype fp32 --num_epochs 1 --batch_size 4"
TABLE = {
    "make demo": Skip("four minutes; other tests run its scripts"),
    "make test": Skip("this is it"),
    "make test-fast": Skip("a part of this"),
    "pip install -r requirements.txt": INSTALLS,
    "pip install -r requirements-extras.txt": INSTALLS,
    "python prepare_fineweb.py": Run("--data_files 'corpus/*.jsonl' --max_tokens 20000 --num_proc 0",
                                     ["data/edu_fineweb10B/manifest.json"]),
    "python prepare_fineweb.py --data_files 'fineweb/*.parquet' --out data/fineweb":
        Run("--data_files 'corpus/*.jsonl' --max_tokens 20000 --num_proc 0", ["data/fineweb/manifest.json"]),
    "python prepare_fineweb.py --verify --out data/demo": Run(),
    "torchrun --nproc_per_node=8 train.py": Run(f"{TINY} --log_dir logs/real", ["logs/real/model_00002.pt"]),
    "python hellaswag.py --checkpoint logs/model_19073.pt": Run("--device cpu --limit 4"),
    "python hellaswag.py --checkpoint logs/model_19073.pt --overlap data/edu_fineweb10B":
        Run("--device cpu --limit 4 --overlap data/demo"),
    "python inference.py --prompt \"Hello, I'm a language model,\" --num_seq 3": Run("--device cpu --max_tokens 4"),
    "python prepare_text.py mybook.txt --out data/mybook": Run("", ["data/mybook/manifest.json"]),
    "python train.py --data_dir data/mybook --log_dir logs/mybook --block_size 64 --total_batch_size 4096 "
    "--micro_batch_size 16 --max_lr 6e-4 --max_steps 10000 --stop_loss 0.09 --eval_every 100 --hellaswag_every 0":
        Run(f"{TINY} --stop_loss 100", ["logs/mybook/model_00001.pt"]),
    "python hellaswag.py --checkpoint gpt2 --style lm_eval": Run("--device cpu --limit 4"),
    "python evaluate.py --text mybook.txt --checkpoint logs/demo/model_00600.pt": Run("--device cpu --text new.csv "
                                                                                      "--text_column review"),
    "python evaluate.py --text corpus/ mybook.txt": Run("--device cpu --limit 2"),
    "python evaluate.py --data_dir data/edu_fineweb10B --limit 1000 --checkpoint gpt2":
        Run("--data_dir data/demo --device cpu --limit 2"),
    "python evaluate.py --tasks hellaswag,lambada_openai,arc_easy,piqa,winogrande --checkpoint logs/model_19073.pt":
        Run("--tasks hellaswag --device cpu --limit 4"),
    "torchrun --nproc_per_node=8 evaluate.py --tasks hellaswag --num_fewshot 5 --checkpoint gpt2":
        Skip("test_hellaswag.py has two processes score and write"),
    "hf download Rowan/hellaswag --repo-type dataset --local-dir Rowan/hellaswag": Skip("needs the hub"),
    "python evaluate.py --data_dir data/edu_fineweb10B --limit 1000 --checkpoint logs/a/model_19073.pt "
    "--compare logs/b/model_19073.pt": Run("--data_dir data/demo --limit 1 --checkpoint logs/model_19073.pt "
                                           "--compare gpt2 --device cpu"),
    "python evaluate.py --tasks hellaswag --checkpoint logs/a/model_19073.pt --compare gpt2":
        Skip("test_harness.py compares"),
    "python evaluate.py --tasks lambada_openai,arc_easy --checkpoint logs/model_19073.pt --compare gpt2":
        Skip("test_harness.py compares"),
    'python inference.py --checkpoint gpt2 --prompt "Once" --prompt "Twice" --temperature 0.8 --top_p 0.95 --stream':
        Run("--device cpu --max_tokens 4"),
    "python plot.py logs/demo": Run("", ["logs/demo/plot.png"]),
    "python plot.py logs/adamw logs/muon --x hours --out compare.svg": Run("", ["compare.svg"]),
    "python lr_finder.py --data_dir data/demo --log_dir logs/new --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 "
    "--total_batch_size 2048 --max_steps 600": Run(f"{TINY} --steps 12", ["logs/new/lr_finder.png"]),
    "python lr_finder.py --data_dir data/demo --log_dir logs/new --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 "
    "--total_batch_size 2048 --max_steps 600 --steps 120 --lr_low 1e-5":
        Run(f"{TINY} --steps 12", ["logs/new/lr_finder.csv"]),
    "streamlit run app.py": Probe("--server.port {port} --server.headless true"),
    "streamlit run app.py -- --checkpoint gpt2 --device cpu": Skip("the same server; test_app.py gives it flags"),
    "python train.py --mlflow ...": Run(f"{TINY} --data_dir data/demo --log_dir logs/tracked",
                                        ["logs/tracked/mlflow.db"]),
    "MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri sqlite:///logs/mlflow.db": Probe("--port {port}"),
    "python finetune_classifier.py --data reviews.csv --init_from gpt2 --out logs/reviews":
        Run(TUNED, ["logs/reviews/classifier.pt", "logs/reviews/metrics.json"]),
    "python finetune_classifier.py --data reviews.csv --text_column review --label_column sentiment --init_from gpt2 "
    "--out logs/reviews": Run(f"{TUNED} --text_column text --label_column label", ["logs/reviews/classifier.pt"]),
    'python finetune_classifier.py --checkpoint logs/reviews/classifier.pt --predict "I would buy it again"':
        Run("--device cpu"),
    'python finetune_classifier.py --checkpoint logs/reviews/classifier.pt --predict "Never again."':
        Run("--device cpu"),
    "python finetune_classifier.py --checkpoint logs/reviews/classifier.pt --predict_file new.csv --text_column review "
    "--out labels.csv": Run("--device cpu", ["labels.csv"]),
    "python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct":
        Run(TUNED, ["logs/instruct/adapter/adapter_config.json"]),
    "python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct --merge": Run(TUNED),
    'python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors." --temperature 0 '
    "--num_seq 1": Run("--device cpu --max_tokens 4"),
    'python inference.py --checkpoint nanoGPT/out-shakespeare-char/ckpt.pt --prompt "ROMEO:" --max_tokens 300':
        Run("--device cpu --max_tokens 4"),
    "python train.py --data_dir nanoGPT/data/shakespeare_char --init_from nanoGPT/out-shakespeare-char/ckpt.pt "
    "--log_dir logs/shakespeare --total_batch_size 16384 --max_steps 500 --max_lr 1e-4 --dropout 0.2 --eval_every 50":
        Run("--device cpu --total_batch_size 64", ["logs/shakespeare/model_00500.pt"]),
    'python inference.py --checkpoint logs/shakespeare/model_00500.pt --prompt "ROMEO:" --max_tokens 300':
        Run("--device cpu --max_tokens 4"),
    "python train.py --data_dir nanoGPT/data/shakespeare_char --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 "
    "--log_dir logs/new --total_batch_size 16384 --max_steps 5000 --max_lr 1e-3 --dropout 0.2":
        Run(TINY, ["logs/new/model_00002.pt"]),
    "python convert.py --checkpoint logs/demo/model_00600.pt --out demo_hf": Run("", ["demo_hf/model.safetensors"]),
    "git archive HEAD *.py exactgpt .streamlit | tar x -C \"$(mkdir -p /tmp/space && echo /tmp/space)\"":
        Skip("test_examples.py and test_app.py hold the Space together"),
    "cp examples/space/* /tmp/space/": Skip("a copy"),
    "cp logs/model_best.pt /tmp/space/": Skip("a copy"),
    "hf auth login": ACCOUNT,
    "hf repos create USER/my-gpt2 --type space --space-sdk docker": ACCOUNT,
    "hf upload USER/my-gpt2 /tmp/space . --repo-type space": ACCOUNT,
    "make bench": Skip("it takes long; its results are committed"),
    "python -m bench.pack FOLDER": GPU,
    "python -m bench.gpu": GPU,
    "python -m bench.gpu --minutes 7 --only unpack,smoke,dry_run,step,peers": GPU,
    "python -m bench.table": Skip("test_docs.py compares what it writes"),
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=gpt2 --rdzv_endpoint=node0:29400 "
    "--max_restarts=3 --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py": CLUSTER,
    "sbatch examples/slurm.sbatch": CLUSTER,
    "sbatch --nodes=4 --partition=preemptible examples/slurm.sbatch --max_lr 1.8e-3 --schedule wsd": CLUSTER,
}


def commands(page):
    """The commands in the fenced blocks of a page, in order, without comments, continued lines joined."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "sh", "bash") else ():
            line = " ".join(re.sub(r"\s#\s.*", "", line).split())
            first = re.sub(r"^(\w+=\S+ )*", "", line).split(" ")[0]
            if first in PROGRAMS:
                found.append(line)
    return found


@pytest.fixture
def reader(run, tmp_path):
    """The folder of a reader who has text, shards, a short run, a model called gpt2 and nanoGPT's tutorial."""
    here = tmp_path / "reader"
    (here / "corpus").mkdir(parents=True)
    text = "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.\n"
    (here / "mybook.txt").write_text(text * 600)
    (here / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text * 40}) + "\n" for _ in range(40)))
    with open(here / "reviews.csv", "w", newline="") as f:
        rows = [(f"{word} {i}", label) for i in range(20) for word, label in (("good", "yes"), ("bad", "no"))]
        csv.writer(f).writerows([("text", "label"), *rows])
    (here / "new.csv").write_text("review\nvery good\n")
    (here / "alpaca.json").write_text(json.dumps([
        dict(instruction=f"Say {i}", input="", output=str(i)) for i in range(40)]))
    (here / "data" / "hellaswag").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "data" / "hellaswag_20.jsonl", here / "data" / "hellaswag" / "hellaswag_val.jsonl")
    (here / "Rowan" / "hellaswag").mkdir(parents=True)
    for split in ("train", "validation"):
        shutil.copy(ROOT / "tests" / "data" / "hellaswag_20.jsonl", here / "Rowan" / "hellaswag" / f"{split}.jsonl")
    characters = write_nanogpt_data(here / "nanoGPT" / "data" / "shakespeare_char", f"ROMEO:\n{text}" * 40)
    model = GPT(GPTConfig(32, len(characters), 1, 1, 8, bias=False, activation="gelu"))
    write_nanogpt_checkpoint(here / "nanoGPT" / "out-shakespeare-char" / "ckpt.pt", model.state_dict(),
                             "shakespeare_char", n_layer=1, n_head=1, n_embd=8, vocab_size=len(characters))
    steps = [("prepare_text.py", "mybook.txt", "--out", "data/demo"),
             ("train.py", *TINY.split(), "--block_size", "256", "--total_batch_size", "512", "--data_dir", "data/demo",
              "--log_dir", "logs/demo"),
             ("convert.py", "--checkpoint", "logs/demo/model_00002.pt", "--out", "gpt2")]
    for script, *flags in steps:
        rc, _, err = run(script, *flags, cwd=here)
        assert rc == 0, err
    shutil.copy(here / "logs" / "demo" / "model_00002.pt", here / "logs" / "model_19073.pt")
    (here / "logs" / "demo" / "model_00002.pt").rename(here / "logs" / "demo" / "model_00600.pt")
    for name in ("adamw", "muon"):
        shutil.copytree(here / "logs" / "demo", here / "logs" / name)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page, request, run, tmp_path):
    missing = [command for command in commands(page) if command not in TABLE]
    assert not missing, f"{page}: give TABLE of this test the commands {missing}"
    actions = [(command, TABLE[command]) for command in commands(page) if not isinstance(TABLE[command], Skip)]
    reader = request.getfixturevalue("reader") if actions else None
    for command, action in actions:
        if isinstance(action, Run):
            perform(command, action, reader, run)
        else:
            probe(command, action, reader, tmp_path)


def test_every_row_of_the_table_stands_on_a_page():
    assert TABLE.keys() == {command for page in PAGES for command in commands(page)}


def perform(command, action, reader, run):
    """Run the command; assert that it ends well and writes what it should."""
    program, *words = shlex.split(f"{command.replace(' ...', '')} {action.more}")
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words[1:]]
        words[words.index("train.py")] = str(ROOT / "train.py")
    rc, out, err = run(*words, cwd=reader)
    assert rc == 0, f"{command}\n{out}\n{err}"
    for name in action.writes:
        assert (reader / name).exists(), f"{command} did not write {name}"


def probe(command, action, reader, tmp_path):
    """Start the server, see its page, end it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [w for w in shlex.split(f"{command} {action.more.format(port=port)}") if "=" not in w or w.startswith("-")]
    words = [sys.executable, "-m", *words]
    if "app.py" in words:
        words[words.index("app.py")] = str(ROOT / "app.py")
    log = open(tmp_path / "server.log", "w+")
    process = subprocess.Popen(words, cwd=reader, stdout=log, stderr=log, start_new_session=True,
                               env=script_env(tmp_path, {"MLFLOW_DISABLE_TELEMETRY": "true"}))
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
                    assert answer.status == 200
                return
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
