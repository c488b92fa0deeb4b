"""inference.py: whole characters, streamed or not; prompts from flags, files, pipes and a terminal."""
import io
import os
import random
import select
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import inference
from exactgpt import generation
from exactgpt.checkpoint import checkpoint_path, save_checkpoint
from exactgpt.generation import Continuation, alpaca_prompt, generate, generate_ids, stream
from exactgpt.tokenizer import Tokenizer
from model import GPT, GPTConfig
from tests.common import ROOT, refusal, script_env

FLAGS = ("--device", "cpu", "--dtype", "fp32", "--num_seq", "2", "--max_tokens", "12")


@pytest.fixture
def byte_model():
    """A byte-level model with a vocabulary padded to 320, and its tokenizer of 257 tokens."""
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 320, 1, 2, 16)).eval(), Tokenizer([], "bytes")


@pytest.fixture
def saved(byte_model, tmp_path, monkeypatch):
    """The byte model, saved as logs/demo/model_00007.pt in the current folder."""
    model, tokenizer = byte_model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_checkpoint(checkpoint_path(tmp_path / "logs" / "demo", 7), dict(
        model=model.state_dict(), config=model.config_dict(), tokenizer=tokenizer.to_checkpoint(), step=7,
        val_loss=5.5))
    return tmp_path / "logs" / "demo" / "model_00007.pt"


def expected_output(byte_model, prompts, **options):
    """Return what the script prints for these prompts with FLAGS: two continuations of each."""
    texts, _ = generate(*byte_model, [p for p in prompts for _ in range(2)], max_tokens=12, **options)
    return "".join(f"> {text}\n" for text in texts)


def main(capsys, *flags):
    """Run inference.py in this process with FLAGS and more; return (standard output, standard error)."""
    inference.main([*FLAGS, *map(str, flags)])
    return capsys.readouterr()


def pipe(monkeypatch, data):
    """Replace standard input by a pipe with these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# -----------------------------------------------------------------------------
# text from tokens

def test_generate_gives_prompt_and_continuation_and_counts_tokens(byte_model):
    model, tokenizer = byte_model
    prompts = ["Hello", "", "h\u00e9"]
    texts, n_tokens = generate(model, tokenizer, prompts, max_tokens=6, seed=3)
    ids = [tokenizer.encode("Hello"), [256], tokenizer.encode("h\u00e9")]
    steps = list(generate_ids(model, ids, n_vocab=257, eot=256, max_tokens=6, seed=3))
    rows = [[t for t in row if t is not None] for row in zip(*steps)]
    assert n_tokens == sum(map(len, rows))
    assert texts == [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, rows)]


def continuation_of(tokenizer, ids, stop=()):
    """Return (the Continuation of these ids, its text after each step) and check that the text only grows."""
    continuation, texts = Continuation(tokenizer, stop), [""]
    for token in [*ids, None]:
        continuation.add(token)
        assert continuation.text.startswith(texts[-1])
        texts.append(continuation.text)
    return continuation, texts


def test_characters_of_several_tokens_appear_whole_and_invalid_bytes_as_decode_shows_them():
    tokenizer, rng = Tokenizer([], "bytes"), random.Random(0)
    _, texts = continuation_of(tokenizer, tokenizer.encode("a\u00e9\u6771\U0001f600!"))
    assert texts == ["", "a", "a", "a\u00e9", "a\u00e9", "a\u00e9", "a\u00e9\u6771", *["a\u00e9\u6771"] * 3,
                     "a\u00e9\u6771\U0001f600", "a\u00e9\u6771\U0001f600!", "a\u00e9\u6771\U0001f600!"]
    letters = tokenizer.encode("ab\u00e9\u6771\U0001f600")
    for _ in range(500):
        ids = [rng.choice(letters) if rng.random() < 0.8 else rng.randrange(256) for _ in range(rng.randrange(12))]
        continuation, _ = continuation_of(tokenizer, ids)
        assert continuation.text == tokenizer.decode(ids) and continuation.n_tokens == len(ids) and continuation.ended


def test_a_continuation_ends_before_the_first_stop_text_and_never_shows_a_part_of_it():
    tokenizer, rng = Tokenizer([], "bytes"), random.Random(0)
    for _ in range(2000):
        ids = tokenizer.encode("".join(rng.choice("ab\u00e9") for _ in range(rng.randrange(15))))
        stop = ["".join(rng.choice("ab\u00e9") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        continuation, texts = continuation_of(tokenizer, ids, stop)
        whole = tokenizer.decode(ids)
        heads = [head for n in range(len(whole) + 1) if any(s in (head := whole[:n]) for s in stop)]
        assert continuation.text == (whole[:min(heads[0].find(s) for s in stop if s in heads[0])] if heads else whole)
        assert not any(s in text for text in texts for s in stop)
    continuation, texts = continuation_of(tokenizer, tokenizer.encode("one\n\ntwo"), ["\n\n"])
    assert texts == ["", "o", "on", "one", "one", *["one"] * 5] and continuation.n_tokens == 5
    assert continuation_of(tokenizer, tokenizer.encode("one\n"), ["\n\n"])[0].text == "one\n"      # no stop text


def test_stream_ends_with_the_text_of_generate_when_all_continuations_have_ended(byte_model):
    prompts = ["Hello", "", "Once upon a time in a far away country"]
    texts, n_tokens = generate(*byte_model, prompts, max_tokens=30, stop=["e"])
    steps = list(stream(*byte_model, prompts, max_tokens=30, stop=["e"]))
    continuations = steps[-1]
    assert [p + c.text for p, c in zip(prompts, continuations)] == texts and all(c.ended for c in continuations)
    assert sum(c.n_tokens for c in continuations) == n_tokens and not any("e" in c.text for c in continuations)
    assert len(steps) <= 31
    every_byte = [tuple(map(chr, range(128)))]
    assert len(list(stream(*byte_model, prompts[:1], temperature=0, stop=[*every_byte[0], "\ufffd"]))) == 1


# -----------------------------------------------------------------------------
# the script

def test_the_script_gives_the_same_text_for_a_seed_and_uses_the_newest_checkpoint(run, byte_model, saved, tmp_path):
    flags = ("--prompt", "Once", "--prompt", "Twice", "--seed", 5)
    rc, out, err = run("inference.py", *FLAGS, *flags, cwd=tmp_path)
    assert rc == 0 and "model_00007.pt: " in err and "step 7, validation loss 5.5000" in err and "tokens/s" in err
    expected = expected_output(byte_model, ["Once", "Twice"], seed=5)
    assert out == expected.replace("\r", "\n")                       # as a text stream is read
    assert run("inference.py", *FLAGS, *flags, "--stream", cwd=tmp_path)[:2] == (0, out)


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(top_k=3), dict(top_k=0, top_p=0.5),
                                     dict(stop=["a", "e"])], ids=str)
def test_every_flag_reaches_the_sampling(byte_model, saved, capsys, options):
    flags = [f"--{name}={v}" for name, value in options.items() for v in (value if name == "stop" else [value])]
    assert main(capsys, "--prompt", "Once", *flags).out == expected_output(byte_model, ["Once"], **options)


def test_prompts_come_from_files_and_pipes_too(byte_model, saved, capsys, tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_bytes("Es war\r\neinmal \u00fcber\n\n".encode())
    expected = expected_output(byte_model, ["Once", "Es war\neinmal \u00fcber\n"])
    assert main(capsys, "--prompt", "Once", "--prompt_file", tmp_path / "story.txt").out == expected
    pipe(monkeypatch, b"Es war\n")
    assert main(capsys).out == expected_output(byte_model, ["Es war"])
    pipe(monkeypatch, b"not read")
    assert main(capsys, "--prompt", "").out == expected_output(byte_model, [""])             # a new document


def test_an_instruction_becomes_alpacas_prompt_and_only_the_answer_is_printed(byte_model, saved, capsys):
    prompt = alpaca_prompt("Add.", "1 2")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in prompt
    texts, _ = generate(*byte_model, [prompt] * 2, max_tokens=12)
    out, err = main(capsys, "--instruction", "Add.", "--input", "1 2")
    assert out == "".join(f"> {text[len(prompt):]}\n" for text in texts)
    assert "its beginning is ignored" in err                         # the window has only 32 tokens
    assert "note: nothing says that" in err and "was tuned on instructions" in err
    assert "note:" not in main(capsys, "--prompt", "x").err
    assert "Input" not in alpaca_prompt("Add.") and alpaca_prompt("Add.").endswith("Add.\n\n### Response:\n")


def test_bf16_works_with_packed_weights_and_with_compile_off(byte_model, saved, capsys):
    for compile in ("auto", "off"):
        out, err = main(capsys, "--prompt", "Once", "--dtype", "bf16", "--compile", compile)
        assert out.count("> Once") == 2 and "on cpu in bf16" in err


def test_a_prompt_that_is_typed_again_gets_another_text(byte_model, saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", Mock(side_effect=["Once", "", "Once", EOFError]))
    out, _ = main(capsys, "--seed", 5)
    texts = [expected_output(byte_model, ["Once"], seed=(5, number)) for number in (0, 2)]
    assert out == "".join(texts) + "\n" and texts[0] != texts[1]


@pytest.mark.slow
def test_on_a_terminal_it_reads_one_prompt_per_line_until_ctrl_d(saved, tmp_path):
    """This one is said to know ASCII only, which is not true: what is typed is read, and shown with escapes."""
    pty = pytest.importorskip("pty")
    terminal, its_end = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "inference.py", *FLAGS[:-1], "1000000"], stdin=its_end,
                               stdout=its_end, stderr=its_end, cwd=tmp_path,
                               env=script_env(tmp_path, dict(PYTHONIOENCODING="ascii")),
                               start_new_session=True, preexec_fn=take_terminal)
    os.close(its_end)
    shown = read_until(terminal, b"prompt: ")
    assert "model_00007.pt" in shown and "Ctrl-D quits" in shown
    os.write(terminal, "Onc\u00e9\n".encode())
    read_until(terminal, rb"> Onc\xe9")
    os.write(terminal, b"\x03")                                      # Ctrl-C: interrupt this text
    read_until(terminal, b"prompt: ")
    os.write(terminal, b"\n")
    read_until(terminal, b"prompt: ")
    os.write(terminal, b"\x04")
    assert process.wait(20) == 0
    os.close(terminal)


def take_terminal():
    """Make standard input the controlling terminal of the child, so that Ctrl-C is a signal."""
    import fcntl
    import termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(terminal, text, seconds=60):
    """Read a terminal until a text appears; return what it showed."""
    shown, end = b"", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536)
    return shown.decode(errors="replace")


def test_piped_text_that_is_not_utf_8_is_advised_without_a_file_name(monkeypatch):
    pipe(monkeypatch, "caf\xe9".encode("utf-16"))
    assert refusal(inference.main, []) == (
        "standard input is not UTF-8 text but UTF-16; convert it first: iconv -f utf-16 -t utf-8 FILE > NEW")


def test_mistakes_are_one_line_and_status_2(gpt_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe(monkeypatch, b"")
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for flags, message in (([], "no prompt; pass --prompt"), (["--prompt", "x"], "no model_XXXXX.pt below logs/"),
                           (["--prompt", "x", "--checkpoint", "bad.pt"], "cannot load bad.pt"),
                           (["--prompt", "x", "--checkpoint", "gone.pt"], "cannot read the checkpoint gone.pt"),
                           (["--prompt", "x", "--checkpoint", "latin.txt"], "cannot load latin.txt"),
                           (["--prompt", "x", "--checkpoint", "."], "no model_XXXXX.pt below ./"),
                           (["--prompt", "x", "--checkpoint", str(gpt_nano)], "has no tokenizer for its 3 tokens"),
                           (["--prompt", "x", "--max_tokens", "0"], "--max_tokens must be >= 1"),
                           (["--prompt", "x", "--temperature", "-1"], "--temperature must be >= 0.0"),
                           (["--prompt", "x", "--top_p", "0"], "--top_p must be > 0"),
                           (["--prompt", "x", "--temp", "1"], "did you mean --temperature?"),
                           (["--prompt", "x", "--stop", ""], "--stop must not be empty"),
                           (["--prompt", "x", "--instruction", "y"], "--instruction and --prompt cannot be combined"),
                           (["--prompt", "x", "--input", "y"], "--input needs an --instruction"),
                           (["--prompt_file", "gone.txt"], "cannot read gone.txt: No such file"),
                           (["--prompt_file", "latin.txt"], "latin.txt is not UTF-8 text (it contains the byte 0xe9)")):
        with pytest.raises(inference.UserError) as caught:
            inference.main(flags)
        assert message in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_a_prompt_longer_than_the_window_is_cut_with_a_warning(byte_model, saved, capsys):
    out, err = main(capsys, "--prompt", "x" * 100)
    assert out == expected_output(byte_model, ["x" * 100])
    assert "warning: a prompt has 100 tokens, but the model's window is 32; its beginning is ignored\n" in err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")], ids=type)
def test_out_of_memory_is_one_line(saved, monkeypatch, error):
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(generation, "generate_ids", fail)
    with pytest.raises(inference.UserError, match="smaller --num_seq or --max_tokens"):
        inference.main(["--prompt", "x"])
