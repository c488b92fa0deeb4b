"""convert.py: weights survive Hugging Face format and back bit for bit, and foreign checkpoints work everywhere."""
import json

import pytest
import torch

import convert
import hellaswag
import inference
from exactgpt import huggingface
from exactgpt.checkpoint import read_checkpoint, save_checkpoint
from exactgpt.config import RunFailed, UserError
from exactgpt.files import write_json
from exactgpt.generation import generate_ids
from exactgpt.huggingface import state_to_huggingface, tokenizer_files
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer, train_tokenizer
from model import GPT, GPTConfig
from tests import folders
from tests.common import in_our_layout

CORPUS = ["the cat and the hat; the d\u00e9j\u00e0 vu\n\n  of the year 2024 \u6771\u4eac don't\t!"] * 3


@pytest.fixture
def trained(tmp_path):
    """(path, model, tokenizer) of our checkpoint with a trained vocabulary, a padded embedding and large weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CORPUS, 300)
    model = GPT(GPTConfig(32, 320, 2, 3, 24, activation="gelu")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (1 if parameter.dim() > 1 else 0.1))
    save_checkpoint(tmp_path / "ours.pt", dict(model=model.state_dict(), config=model.config_dict(), step=7,
                                               val_loss=1.5, tokenizer=tokenizer.to_checkpoint()))
    return tmp_path / "ours.pt", model, tokenizer


def main(*flags):
    convert.main([str(f) for f in flags])


def greedy_ids(model, prompt, n_vocab, n=12):
    """Return the ids that greedy sampling appends to a prompt."""
    return [step[0] for step in generate_ids(model, [prompt], n_vocab=n_vocab, max_tokens=n, temperature=0)]


def test_our_model_converts_to_transformers_and_back_bit_for_bit(trained, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    path, model, tokenizer = trained
    main("--checkpoint", path, "--out", tmp_path / "hf")
    out = capsys.readouterr().out
    assert "the weights are bitwise equal" in out and "with transformers" in out
    assert "token ids: equal to those of the export in " in out and "of every kind" in out
    assert f'next: python inference.py --checkpoint {tmp_path / "hf"} --prompt ' in out

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.vocab_size == tokenizer.n_vocab < model.config.vocab_size
    ids = torch.randint(tokenizer.n_vocab, (2, 32))
    torch.testing.assert_close(theirs(ids).logits, model(ids)[..., :tokenizer.n_vocab], atol=1e-3, rtol=1e-3)
    prompt = tokenizer.encode("the cat")
    expected = greedy_ids(model, prompt, tokenizer.n_vocab)
    write = pipeline("text-generation", model=theirs, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"))
    text = write("the cat", do_sample=False, min_new_tokens=12, max_new_tokens=12)[0]["generated_text"]
    assert text == "the cat" + tokenizer.decode(expected)

    main("--checkpoint", tmp_path / "hf", "--out", tmp_path / "back.pt")
    back = open_model(tmp_path / "back.pt")
    assert (back.tokenizer.name, back.tokenizer.merges) == (tokenizer.name, tokenizer.merges)
    assert back.model.config == GPTConfig(32, tokenizer.n_vocab, 2, 3, 24, activation="gelu", padded=False)
    for name, tensor in back.model.state_dict().items():
        original = model.state_dict()[name]
        assert torch.equal(tensor, original[:tokenizer.n_vocab] if "wte" in name or "lm_head" in name else original)
    assert greedy_ids(back.model.eval(), prompt, tokenizer.n_vocab) == expected


def test_gpt_nano_converts_back_to_the_same_tensors(gpt_nano, tmp_path, capsys):
    from safetensors.torch import load_file
    main("--checkpoint", gpt_nano, "--out", tmp_path / "nano.pt")
    main("--checkpoint", tmp_path / "nano.pt", "--out", tmp_path / "hf")
    assert "the checkpoint has no tokenizer" in capsys.readouterr().out
    before, after = load_file(gpt_nano / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("damage, message", [
    ("weights", "reads back differently"), ("one bit", "transformer.wte.weight reads back differently"),
    ("config", "the logits of our reader differ"),
    ("tokenizer", "tokenizer of the export gives other token ids"),
])
def test_a_wrong_export_is_deleted(trained, tmp_path, monkeypatch, damage, message):
    if damage == "weights":
        monkeypatch.setattr("exactgpt.huggingface.state_to_huggingface", lambda *args: {
            k: v.clone().t().contiguous() if k.endswith("attn.c_proj.weight") else v
            for k, v in state_to_huggingface(*args).items()})
    if damage == "one bit":      # too small a change for the logits to show it
        monkeypatch.setattr("exactgpt.huggingface.state_to_huggingface", lambda *args: {
            k: v.nextafter(v + 1) if k.endswith("wte.weight") else v for k, v in state_to_huggingface(*args).items()})
    if damage == "config":
        monkeypatch.setattr("exactgpt.huggingface.write_json",
                            lambda path, value: write_json(path, {**value, "activation_function": "gelu_new"}))
    if damage == "tokenizer":
        monkeypatch.setattr("exactgpt.huggingface.tokenizer_files", lambda tokenizer, n, **options: tokenizer_files(
            Tokenizer(tokenizer.merges[:-2], ""), n))
    with pytest.raises(RunFailed, match=message):
        main("--checkpoint", trained[0], "--out", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["ours.pt"]


@pytest.mark.parametrize("name, text", [("single digits", "2024"), ("a Lowercase normalizer", "Hello"),
                                        ("add_prefix_space in tokenizer.json", "Hello")])
def test_what_slips_past_the_rules_is_found_by_the_comparison_with_the_sources_own_tokenizer(tmp_path, monkeypatch,
                                                                                             name, text):
    folder = folders.make(name, tmp_path / "hf")
    monkeypatch.setattr(huggingface, "_differences", lambda names, files: iter(()))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')     # takes all as it is
    for out in ("new", "new.pt"):
        with pytest.raises(RunFailed, match=r"tokenizer of .*hf gives other token ids.*nothing was written") as caught:
            main("--checkpoint", folder, "--out", tmp_path / out)
        assert text in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_rows_that_are_not_known_to_be_padding_are_kept(tmp_path, capsys):
    """As many rows as our padding would make, in a folder: they may be tokens of somebody who lost the tokenizer."""
    from safetensors.torch import load_file
    folders.write_folder(tmp_path / "hf", rows=320)
    main("--checkpoint", tmp_path / "hf", "--out", tmp_path / "a.pt")
    assert f"token ids: equal to those of {tmp_path / 'hf'} in " in capsys.readouterr().out
    main("--checkpoint", tmp_path / "a.pt", "--out", tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert open_model(tmp_path / "a.pt").tokenizer.n_vocab == 300


def test_without_transformers_it_says_that_it_has_not_compared(trained, tmp_path, monkeypatch, capsys):
    main("--checkpoint", trained[0], "--out", tmp_path / "hf")
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    main("--checkpoint", tmp_path / "hf", "--out", tmp_path / "back.pt")
    assert f"token ids: not compared with those of {tmp_path / 'hf'}, because trans" in capsys.readouterr().out


def test_what_is_known_of_a_model_goes_with_it(trained, tmp_path):
    known = dict(step=7, val_loss=1.5, base=dict(source="gpt2", sha256="0" * 64))
    save_checkpoint(tmp_path / "tuned.pt", {**read_checkpoint(trained[0]), **known})
    main("--checkpoint", tmp_path / "tuned.pt", "--out", tmp_path / "copy.pt")
    copied = read_checkpoint(tmp_path / "copy.pt")
    assert {name: copied[name] for name in known} == known
    main("--checkpoint", tmp_path / "copy.pt", "--out", tmp_path / "hf")
    assert open_model(tmp_path / "hf").base == known["base"] and open_model(trained[0]).base is None


def test_a_diverged_model_can_be_converted(tmp_path):
    model = GPT(GPTConfig(8, 65, 1, 2, 8))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0] = torch.nan
    save_checkpoint(tmp_path / "a.pt", dict(model=model.state_dict(), config=model.config_dict()))
    main("--checkpoint", tmp_path / "a.pt", "--out", tmp_path / "hf")
    weight = open_model(tmp_path / "hf").model.transformer.h[0].mlp.c_fc.weight
    assert weight[0].isnan().all() and not weight[1:].isnan().any()


def test_user_errors_change_no_file(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for flags, message in ((["--checkpoint", "ours.pt"], "arguments are required: --out"),
                           (["--out", "full", "--checkpoint", "ours.pt"], "full already exists"),
                           (["--out", "ours.pt", "--checkpoint", "ours.pt"], "ours.pt already exists"),
                           (["--out", "new"], "no model_XXXXX.pt below logs/"),
                           (["--out", "new", "--checkpoint", "gone.pt"], "cannot read the checkpoint gone.pt"),
                           (["--out", "new", "--checkpoint", "garbage.pt"], "cannot load garbage.pt"),
                           (["--out", "new", "--checkpoint", "full"], "no model_XXXXX.pt below full/"),
                           (["--out", "garbage.pt/new", "--checkpoint", "ours.pt"], "cannot write"),
                           (["--out", "garbage.pt/new.pt", "--checkpoint", "ours.pt"], "cannot write")):
        with pytest.raises(UserError) as caught:
            main(*flags)
        assert message in str(caught.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


# -----------------------------------------------------------------------------
# foreign checkpoints, from the file to the scripts

BUILD_NANOGPT = """
import sys, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
torch.save({'model': torch.load(sys.argv[1]), 'config': GPTConfig(32, 50304, 2, 3, 24), 'step': 19072,
            'val_loss': 3.07}, sys.argv[2])
"""


@pytest.fixture(params=["nanoGPT", "build-nanogpt"])
def foreign(request, run, tiny_gpt2, tmp_path):
    """(a file in nanoGPT's or build-nanogpt's format, transformers' model of its weights); nanoGPT's has no biases."""
    is_nano = request.param == "nanoGPT"
    theirs = tiny_gpt2(vocab_size=50304, activation_function="gelu" if is_nano else "gelu_new")
    state = {k: in_our_layout(theirs, k, tensor).contiguous().clone() for k, tensor in theirs.state_dict().items()}
    if is_nano:
        for name in [name for name in state if name.endswith("bias")]:
            theirs.state_dict()[name].zero_()
            del state[name]
        args = dict(n_layer=2, n_head=3, n_embd=24, block_size=32, bias=False, vocab_size=50304, dropout=0.0)
        path = tmp_path / "ckpt.pt"
        torch.save(dict(model={f"_orig_mod.{k}": v for k, v in state.items()}, optimizer={}, model_args=args,
                        iter_num=2000, best_val_loss=torch.tensor(3.1), config=dict(out_dir="out")), path)
        return path, theirs
    torch.save(state, tmp_path / "state")
    path = tmp_path / "model_19072.pt"
    rc, _, err = run("-c", BUILD_NANOGPT, tmp_path / "state", path)    # its class pickled as __main__.GPTConfig
    assert rc == 0, err
    return path, theirs


@pytest.mark.slow
def test_a_foreign_checkpoint_works_in_every_script(foreign, run, make_shards, tmp_path, capsys):
    path, theirs = foreign
    tokenizer = open_model(path).tokenizer
    ids = tokenizer.encode("Once upon")

    inference.main(["--checkpoint", str(path), "--prompt", "Once upon", "--num_seq", "1", "--max_tokens", "8",
                    "--temperature", "0", "--dtype", "fp32", "--device", "cpu"])
    expected = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                               max_new_tokens=8, pad_token_id=0, suppress_tokens=list(range(50257, 50304)))[0]
    assert capsys.readouterr().out == f"> {tokenizer.decode(expected.tolist())}\n"

    example = dict(ctx="A man sits", activity_label="Sitting", label=1,
                   endings=["on a chair.", "down.", "up a tree.", "."])
    (tmp_path / "items.jsonl").write_text(json.dumps(example) + "\n")
    hellaswag.main(["--checkpoint", str(path), "--data", str(tmp_path / "items.jsonl"), "--dtype", "fp32", "--device",
                    "cpu", "--json", str(tmp_path / "score.json")])
    losses = []
    for ending in example["endings"]:
        row = torch.tensor(tokenizer.encode(example["ctx"]) + tokenizer.encode(" " + ending))
        targets = row.clone()
        targets[:len(tokenizer.encode(example["ctx"]))] = -100
        losses.append(theirs(row[None], labels=targets[None]).loss.item())
    assert json.loads((tmp_path / "score.json").read_text())["acc_norm"] == (losses.index(min(losses)) == 1)

    shards = make_shards([200], vocab=50257)
    rc, _, err = run("train.py", "--init_from", path, "--data_dir", shards, "--log_dir", tmp_path / "run",
                     "--max_steps", 1, "--total_batch_size", 64, "--hellaswag_every", 0, "--sample_every", 0,
                     "--eval_every", 1, "--val_tokens", 32, "--device", "cpu", "--dtype", "fp32", "--max_lr", 1e-9,
                     "--min_lr", 0)
    assert rc == 0, err
    trained = read_checkpoint(tmp_path / "run" / "model_00001.pt")["model"]
    assert all(torch.allclose(trained[k], v, atol=1e-6) for k, v in open_model(path).model.state_dict().items())

    convert.main(["--checkpoint", str(path), "--out", str(tmp_path / "hf")])
    assert open_model(tmp_path / "hf").model.config.vocab_size == 50257
