"""Each command that a script prints after `next:` runs exactly as printed, offline, in a folder with an odd name."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import app
from exactgpt import shard_writer
from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import command, one_line
from exactgpt.generation import example_prompt
from exactgpt.tokenizer import train_tokenizer
from model import GPT, GPTConfig
from tests import forks
from tests.common import HELLASWAG_FILE, ROOT, script_env

NAME = "it's $a folder"      # what a shell would change, were it not quoted
TEXT = "".join(f"Chapter {i}. It was the {i}th of May, and the sun had risen {i} times.\n" for i in range(60))
MODEL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 32, "--total_batch_size", 64)


@pytest.fixture
def start_script(tmp_path):
    """Return start_script(script, *words) -> (its next commands, output). It runs below NAME and must exit with 0."""
    here = tmp_path / NAME
    here.mkdir()

    def start(script, *words):
        log = here / ".out"
        log.unlink(missing_ok=True)
        process = forks.start(script, words, script_env(tmp_path), log, cwd=here)
        process.join(100)
        output = log.read_text()
        assert process.exitcode == 0, f"{script} {words}\n{output}"
        _, found, after = output.rpartition("next: ")
        lines = [line for line in after.replace("\n      ", "\n").splitlines() if line.startswith("python ")]
        assert bool(lines) == bool(found)
        return lines, output
    return start


def follow(start_script, line):
    """Run a printed command; return what start_script does."""
    python, *words = shlex.split(line)
    assert python == "python"
    return start_script(*words)


@pytest.mark.slow
def test_from_text_to_a_trained_model_by_what_is_printed(start_script, tmp_path):
    (tmp_path / NAME / "text.txt").write_text(TEXT)
    [train], _ = start_script("prepare_text.py", "text.txt", "--train_tokenizer", 300, "--out", f"data/{NAME} 2")
    # the first one in a real shell, whose quoting shlex only imitates
    env = script_env(tmp_path, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    for script in ("train.py", "exactgpt", "model.py", "hellaswag.py"):
        (tmp_path / NAME / script).symlink_to(ROOT / script)
    done = subprocess.run(["bash", "-c", train], cwd=tmp_path / NAME, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    plot, inference = re.search(r"next: (python plot.*)\n      (python inference.*)\n", done.stdout).groups()
    assert "no HellaSwag" not in done.stdout
    _, output = follow(start_script, plot)
    assert f"logs/{NAME} 2/plot.png" in output
    _, output = follow(start_script, inference)
    assert output.count(f"> {example_prompt(train_tokenizer([TEXT], 300))}") == 5
    flags = ("--data_dir", f"data/{NAME} 2", "--log_dir", f"logs/{NAME} 3", "--max_steps", 3, "--steps", 10, *MODEL)
    [train], _ = start_script("lr_finder.py", *flags, "--val_tokens", 64)
    [plot, _], output = follow(start_script, train)
    assert plot.endswith(command("plot.py", f"logs/{NAME} 3")[6:]) and "no HellaSwag: its published scores" in output
    checkpoint = f"logs/{NAME} 3/model_00003.pt"
    [inference], _ = start_script("convert.py", "--checkpoint", checkpoint, "--out", f"{NAME} 4")
    follow(start_script, inference)
    (tmp_path / NAME / "data" / "hellaswag").mkdir()
    (tmp_path / NAME / "data" / "hellaswag" / "hellaswag_val.jsonl").write_text(HELLASWAG_FILE.read_text())
    [hellaswag], _ = start_script("hellaswag.py", "--download")
    follow(start_script, hellaswag)


@pytest.mark.slow
def test_fine_tuned_models_are_used_as_printed(start_script, tmp_path):
    tokenizer, model = train_tokenizer([TEXT], 280), GPT(GPTConfig(320, 320, 1, 2, 16))
    save_checkpoint(tmp_path / NAME / "base.pt", dict(model=model.state_dict(), config=model.config_dict(),
                                                      tokenizer=tokenizer.to_checkpoint()))
    (tmp_path / NAME / "rows.tsv").write_text("text\tlabel\n" + "-x  it's $a\ta\n--x it's $b\tb\n" * 20)
    (tmp_path / NAME / "items.json").write_text(json.dumps([dict(instruction="- Say\n it's $1", output="a")] * 8))
    for script, data, more in (("finetune_classifier.py", "rows.tsv", ()),
                               ("finetune_instruct.py", "items.json", ("--full", "--responses", 0))):
        [line], _ = start_script(script, "--data", data, "--init_from", "base.pt", "--out", f"{script} out",
                                 "--num_epochs", 1, "--device", "cpu", "--dtype", "fp32", *more)
        assert shlex.split(line)[-1] in ("x it's $a", "x it's $b", " Say it's $1", "Say it's $1"), line
        follow(start_script, line)


@pytest.mark.slow
def test_source_files_become_a_command_too(start_script, tmp_path):
    (tmp_path / NAME / "a.jsonl").write_text('{"text": "' + "It was the best of times. " * 400 + '"}\n')
    [line], _ = start_script("prepare_fineweb.py", "--data_files", "*.jsonl", "--out", f"data/{NAME}", "--shard_tokens",
                             300)
    assert "--max_steps 12 " in line and line.endswith(" --hellaswag_every 0")
    words = shlex.split(line)
    assert words[3] == f"data/{NAME}" and words[5] == f"logs/{NAME}" and words[words.index("--block_size") + 1] == "256"


def test_a_gpu_is_asked_for_gpt2_and_a_small_split_for_small_windows(monkeypatch, make_shards):
    from exactgpt.shards import ShardFolder
    shards = ShardFolder(make_shards([4000], val_sizes=[2000]))
    monkeypatch.setattr(shard_writer, "has_gpu", lambda: True)
    assert "--dry_run\n" in shard_writer._next_step("x", shards)
    for n_val, block_size in ((1024, 256), (257, 256), (256, 128), (3, 2), (2, 1)):
        text = shard_writer._next_step("x", ShardFolder(make_shards([4000], val_sizes=[n_val], name=f"v{n_val}")))
        assert f"--block_size {block_size} " in text and "--max_steps 19 " in text
    assert isinstance(shard_writer.has_gpu(), bool)


def test_the_commands_of_the_empty_page_are_there(start_script):
    make, prepare = (line.split("#")[0].split() for line in app.MAKE_ONE.splitlines())
    assert make == ["make", "demo"] and re.search(r"^demo:", (ROOT / "Makefile").read_text(), re.M)
    assert prepare[:2] == ["python", "prepare_text.py"] and (ROOT / prepare[2]).is_file()


def test_an_example_is_one_line_and_no_flag():
    assert one_line("--a\n b\t c ") == "a b c" and one_line(" \n--") == "?"
    assert shlex.split(command("x.py", "--a", Path("it's"), 1, "$b")) == ["python", "x.py", "--a", "it's", "1", "$b"]


def test_every_script_that_says_what_is_next_is_followed_above():
    found = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("exactgpt/*.py")] if re.search(
        r"[\"n]next: ", path.read_text())}
    assert found == {"convert.py", "finetune.py", "hellaswag.py", "lr_finder.py", "shard_writer.py", "train.py"}
