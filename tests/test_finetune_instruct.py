"""finetune_instruct.py: only answers count, each token as much as any other; adapters merge, travel, and follow."""
import json
import math

import pytest
import torch
from torch.nn import functional as F

import convert
import finetune_instruct
import inference
from exactgpt.checkpoint import read_checkpoint, save_checkpoint
from exactgpt.config import RunFailed, UserError
from exactgpt.finetune import add_adapter, print_examples, work_in_folder
from exactgpt.generation import alpaca_prompt, generate
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer, train_tokenizer
from finetune_instruct import InstructConfig, encode_item, read_items
from model import GPT, IGNORED, GPTConfig
from tests.common import SHARED_DATA, cpu_runtime
from tests.signals import signalled
from tests.tuning_step import one_step, random_examples

COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
ITEMS = [dict(instruction="Say it twice.", input=c, output=f"{c} {c}") for c in COLOURS * 6]
TINY = ("--device", "cpu", "--dtype", "fp32", "--batch_size", 8, "--num_epochs", 2, "--max_tokens", 8)


@pytest.fixture
def base(tmp_path):
    """(path, model, tokenizer) of a checkpoint: a language model over few words, 96 positions."""
    torch.manual_seed(0)
    texts = [alpaca_prompt(item["instruction"], item["input"]) + item["output"] for item in ITEMS]
    tokenizer = train_tokenizer(texts + [alpaca_prompt("Say it twice.")], 420)
    model = GPT(GPTConfig(96, 448, 2, 2, 32))
    with torch.no_grad():       # as large as trained ones: an adapter finds little in embeddings that say nothing
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    save_checkpoint(tmp_path / "base.pt", dict(model=model.state_dict(), config=model.config_dict(), step=3,
                                               val_loss=5.0, tokenizer=tokenizer.to_checkpoint()))
    return tmp_path / "base.pt", model, tokenizer


@pytest.fixture
def data(tmp_path):
    """A .json file of 48 items."""
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    return tmp_path / "items.json"


def main(*flags):
    finetune_instruct.main([str(f) for f in flags])


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


# -----------------------------------------------------------------------------
# examples and their loss

def test_the_answer_and_its_end_are_learned_and_nothing_else():
    tokenizer = Tokenizer([], "bytes")
    example = encode_item(("Add.", "1 2", "3\u00e9"), tokenizer, 1000)
    prompt = alpaca_prompt("Add.", "1 2")
    shown, n = [], len(prompt)
    print_examples([example], tokenizer, tokenizer.decode, shown.append)
    assert shown == [f"example 1: {n + 3} tokens, 4 targets\n  masked  | {prompt!r}\n"
                     "  learned | '3\u00e9<|endoftext|>'"]
    ids = [*tokenizer.encode(prompt + "3\u00e9"), tokenizer.eot]
    assert example.tokens.tolist() == ids[:-1] and example.targets.tolist() == [IGNORED] * (n - 1) + ids[n:]


def test_long_answers_are_cut_and_items_without_an_answer_in_reach_left_out():
    tokenizer = Tokenizer([], "bytes")
    n = len(alpaca_prompt("Go."))
    items = [("Go.", "", "x" * 40), ("Go.", "", "yes"), ("Go.", "", " "), ("Go. " + "x" * 99, "", "yes")]
    encoded = [encode_item(item, tokenizer, n + 9) for item in items]
    examples = [example for example in encoded if (example.targets != IGNORED).any()]
    assert examples == encoded[:2] and [len(example) for example in examples] == [n + 9, n + 3]
    assert examples[0].targets[-1] == tokenizer.encode("x")[0] and examples[1].targets[-1] == tokenizer.eot
    assert (examples[0].targets != IGNORED).sum() == 10 and (examples[1].targets != IGNORED).sum() == 4


def expected_step(examples, weights=None):
    """The same by torch's own mean over all targets at once, example by example: (gradients, loss)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 1, 2, 16))
    logits = torch.cat([model(torch.tensor(example.tokens, dtype=torch.long)[None])[0] for example in examples])
    targets = torch.cat([torch.tensor(example.targets, dtype=torch.long) for example in examples])
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, weight=weights)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("budget", [16, 64, 4096], ids="micro-batches of {} tokens".format)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_target_counts_the_same_whatever_the_micro_batches(budget, weighted):
    examples = random_examples(9)
    weights = torch.rand(65, generator=torch.Generator().manual_seed(2)) if weighted else None
    gradients, loss = expected_step(examples, weights)
    found, result = one_step(examples, budget, weights=weights)
    assert math.isclose(result.loss, loss, rel_tol=1e-5) and result.finite
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_one(run_ranks, tmp_path):
    codes, output = run_ranks(2, "tests/tuning_step.py", tmp_path / "found.pt")
    assert codes == [0, 0], output
    for n, found, found_loss in torch.load(tmp_path / "found.pt"):
        gradients, loss = expected_step(random_examples(n))
        assert math.isclose(found_loss, loss, rel_tol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# -----------------------------------------------------------------------------
# adapters

def test_a_merged_model_computes_what_the_adapter_did_and_only_the_adapter_trains():
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 2, 2, 16)).eval()
    names, ids = set(model.state_dict()), torch.randint(65, (2, 32))
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = add_adapter(model, InstructConfig(init_from="base", lora_r=4, lora_alpha=8.0))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 and all("lora_" in name for name in trained)
    with torch.no_grad():
        for p in trained.values():
            p.normal_(std=0.3)
    before = model(ids)
    pairs = {name.partition(".lora_")[0]: None for name in trained}
    expected = {f"{name}.weight": plain[f"{name}.weight"] + 2 * trained[f"{name}.lora_B.default.weight"].detach()
                @ trained[f"{name}.lora_A.default.weight"].detach() for name in pairs}
    assert wrapped.merge_and_unload() is model and set(model.state_dict()) == names
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected.get(name, plain[name]), rtol=1e-5, atol=1e-6)


def test_it_follows_instructions_and_its_adapter_travels(data, base, tmp_path, capsys):
    out = tmp_path / "out"
    main(*TINY, "--data", data, "--init_from", base[0], "--out", out, "--num_epochs", 12, "--max_lr", 2e-2, "--merge")
    report, said = metrics(out), capsys.readouterr().out
    before, after = report["val_loss_before"], report["val_loss_after"]
    assert after < 0.7 * before and report["merged_logits_differ_by"] < 1e-4, said
    assert report["val_loss_falls_by"] == pytest.approx(1 - after / before)
    assert f"validation loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%)" in said
    assert report["items"] == dict(train=43, validation=5, cut=0, left_out=0)
    assert report["base"] == json.loads((out / "adapter" / "base.json").read_text())
    merged = next(out.glob("model_*.pt"))
    checkpoint = read_checkpoint(merged)
    assert checkpoint["base"] == report["base"] and checkpoint["step"] == 6 * report["best_epoch"]

    answers = json.loads((out / "responses.json").read_text())
    assert len(answers) == 5 and {a["output"] for a in answers} <= {f"{c} {c}" for c in COLOURS}
    flags = ("--instruction", "Say it twice.", "--input", answers[0]["input"], "--num_seq", "1", "--temperature", "0",
             "--max_tokens", "8", *TINY[:4])
    for source in (merged, out / "adapter"):
        inference.main(["--checkpoint", str(source), *flags])
        answer, err = capsys.readouterr()
        assert answer == f"> {answers[0]['response']}\n" and "note:" not in err      # it was tuned

    check_adapter_in_transformers(base, out, tmp_path)
    other = read_checkpoint(base[0])
    other["model"]["transformer.wpe.weight"] += 1
    save_checkpoint(base[0], other)
    with pytest.raises(UserError, match="are not those that the adapter"):
        open_model(out / "adapter")


def check_adapter_in_transformers(base, out, tmp_path):
    """peft puts the adapter beside the exported base in transformers, and the logits are the merged model's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    convert.main(["--checkpoint", str(base[0]), "--out", str(tmp_path / "hf")])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), str(out / "adapter"))
    ours = open_model(next(out.glob("model_*.pt"))).model.eval()
    n_vocab = base[2].n_vocab
    ids = torch.randint(n_vocab, (2, 96))
    torch.testing.assert_close(theirs.eval()(ids).logits, ours(ids)[..., :n_vocab], rtol=1e-3, atol=1e-3)


def test_the_state_of_a_run_records_the_learning_rate_itself_where_none_was_typed(tmp_path):
    """Else a later version with another default would resume the run at another rate."""
    found = []
    for more in (dict(), dict(full=True), dict(full=True, max_lr=3e-3)):
        config = InstructConfig(data="x", init_from="y", out=str(tmp_path / "out"), **more)
        work_in_folder(config, cpu_runtime(), lambda config, runtime, state: found.append(config.max_lr))
    assert found == [5e-4, 5e-5, 3e-3]


def test_a_killed_full_run_goes_on_to_the_same_model_which_writes_its_responses(run, data, base, tmp_path, capsys):
    flags = (*TINY, "--data", data, "--init_from", base[0], "--full", "--max_lr", 3e-3, "--dropout", 0.1)
    main(*flags, "--out", tmp_path / "straight")
    (tmp_path / "die.py").write_text(signalled("finetune_instruct", 9, "SIGKILL"))
    assert run(str(tmp_path / "die.py"), *flags, "--out", tmp_path / "killed")[0] == -9
    main(*flags, "--out", tmp_path / "killed")
    assert "resuming from step 6" in capsys.readouterr().out
    first, second = (read_checkpoint(tmp_path / name / "model_00012.pt") for name in ("straight", "killed"))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    answers = json.loads((tmp_path / "killed" / "responses.json").read_text())[:2]
    opened = open_model(tmp_path / "killed")
    prompts = [alpaca_prompt(a["instruction"], a["input"]) for a in answers]
    texts, _ = generate(opened.model.eval(), opened.tokenizer, prompts, temperature=0.0, max_tokens=8)
    assert texts == [prompt + a["response"] for prompt, a in zip(prompts, answers)]


@pytest.mark.slow
def test_two_processes_tune_the_same_adapter_as_one(run_ranks, data, base, tmp_path):
    flags = (*TINY, "--data", data, "--init_from", base[0], "--responses", 0, "--num_epochs", 1)
    codes, output = run_ranks(2, "finetune_instruct.py", *flags, "--out", tmp_path / "two")
    assert codes == [0, 0] and "2 processes" in output, output
    main(*flags, "--out", tmp_path / "one")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert math.isclose(one["val_loss_before"], two["val_loss_before"], rel_tol=1e-5)
    assert math.isclose(one["val_loss_after"], two["val_loss_after"], rel_tol=1e-4)


def test_a_dry_run_marks_what_is_masked_and_leaves_nothing(data, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(*TINY, "--data", data, "--init_from", base[0], "--merge", "--dry_run", "--block_size", 90)    # cuts some
    out = capsys.readouterr().out
    assert out.count("  masked  | 'Below is an instruction") == 3 and out.count("  learned | '") == 3
    assert "the full run of 12 steps" in out and sorted(tmp_path.rglob("*")) == before


# -----------------------------------------------------------------------------
# mistakes, real data

@pytest.mark.parametrize("name, text, message", [
    ("a.json", '[{"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}]',
     "a.json, item 2: 'output' must be text, but is None; the item has instruction, response"),
    ("a.json", '[{"instruction": 3, "output": "b"}]', "item 1: 'instruction' must be text, but is 3"),
    ("a.json", '[{"instruction": " ", "output": "b"}]', "item 1: 'instruction' must be text, but is ' '"),
    ("a.json", '["b"]', "item 1: must be a JSON object, but is a str"),
    ("a.json", '{"instruction": "a"}', "must hold a JSON list, but holds a dict"),
    ("a.json", '[{"instruction": "a", "output": "b"}]', "a.json holds 1 item; it needs two or more"),
    ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": "a", "outp', "a.jsonl, line 3: not valid JSON"),
    ("a.csv", "instruction,output\n", "a.csv must be a .json list or a .jsonl file"),
    ("a.jsonl", None, "cannot read")])
def test_mistakes_in_the_data_are_named_by_item(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_items(str(tmp_path / name))
    assert message in str(caught.value)


def test_other_mistakes_are_one_line(data, base, tmp_path):
    flags = ("--device", "cpu", "--data", data, "--out", tmp_path / "out")
    for more, message in ((["--init_from", base[0], "--block_size", 8], "leaves no item to"),
                          (["--init_from", tmp_path / "gone.pt"], "cannot read the checkpoint"),
                          (["--init_from", base[0], "--min_lr", 1], "--min_lr 1 is above --max_lr 0.0005"),
                          ([], "--init_from is missing")):
        with pytest.raises(UserError) as caught:
            main(*flags, *more)
        assert message in str(caught.value)


def test_the_instruction_file_is_read():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    items = read_items(str(SHARED_DATA / "instruction_data.json"))
    assert len(items) == 1100 and items[2] == ("Convert 45 kilometers to meters.", "", "45 kilometers is 45000 meters.")


def test_results_that_cannot_be_written_say_how_to_repeat_the_writing(data, base, tmp_path, monkeypatch, capsys):
    flags = (*TINY, "--data", data, "--init_from", base[0], "--out", tmp_path / "out", "--num_epochs", 1)

    def full_disk(*_):
        raise UserError("cannot write adapter: No space left on device")
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"No space left .* the same command resumes"):
        patch.setattr(finetune_instruct, "save_adapter", full_disk)
        main(*flags)
    main(*flags)
    assert "resuming from step 6" in capsys.readouterr().out and (tmp_path / "out" / "adapter").is_dir()
    state = read_checkpoint(tmp_path / "out" / "state_00006.pt")
    assert state["config"]["max_lr"] == 5e-4      # the default, as a number
