"""hellaswag.py and scoring.py: the scores equal those of independent references for any batch size."""
import json
import lzma
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hellaswag
from exactgpt.distributed import StopRequested
from exactgpt.scoring import batch_by_length, ending_losses, pack_question
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer
from hellaswag import evaluate_hellaswag, load_hellaswag, main, parse_example, tokenize_examples
from model import GPT, GPTConfig
from tests.common import (
    HELLASWAG_EXAMPLE,
    HELLASWAG_FILE,
    ROOT,
    SHARED_DATA,
    cpu_runtime,
    script_env,
    torchrun_arguments,
)

REAL = SHARED_DATA / "hellaswag_val.jsonl.xz"


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return Tokenizer([], "bytes")


@pytest.fixture(scope="module")
def gpt():
    """gpt(block_size=..., vocab_size=...) -> a small GPT with well separated losses; its default is over bytes."""
    def make(block_size=1024, vocab_size=320, dropout=0.0):
        torch.manual_seed(1)
        model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=dropout)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape))
        return model
    return make


# -----------------------------------------------------------------------------
# references

class Unigram(torch.nn.Module):
    """A stub with a known loss per byte: 1 bit for a space, 2 for an "a", 3 for a "b", 4 for a "c"."""
    def __init__(self):
        super().__init__()
        self.config = GPTConfig(block_size=32, vocab_size=257)
        shares = torch.full((257,), (1 - 15 / 16) / 253)
        for byte, bits in zip(" abc", (1, 2, 3, 4)):
            shares[Tokenizer([], "bytes").encode(byte)] = 0.5 ** bits
        self.logits = shares.log()

    def hidden(self, idx, positions, attn_mask):
        return torch.zeros(*idx.shape, 1)

    def lm_head(self, hidden):
        return self.logits.expand(len(hidden), -1)


def test_scores_of_a_stub_model_equal_those_computed_by_hand(bytes_tokenizer):
    def score(label, style):
        endings = ["ccc", "aaaaaaa", "aaaa aaaa", "b b"]
        item = {**HELLASWAG_EXAMPLE, "endings": endings, "label": label}
        prepared = tokenize_examples([parse_example(item, style, "here")], bytes_tokenizer, 32, style)
        losses = ending_losses(Unigram(), prepared.questions, 4, cpu_runtime()).reshape(-1, 4)
        # in bits, the space before the ending included
        np.testing.assert_allclose(losses[0] / math.log(2), [1 + 12, 1 + 14, 1 + 17, 1 + 7], rtol=1e-6)
        result = evaluate_hellaswag(Unigram(), prepared, cpu_runtime())
        return result.acc, result.acc_norm
    # Smallest sum: 8 bits, ending 3. Per token (space included): 13/4, 15/8, 18/10, 8/4: ending 2 at 1.8 bits.
    assert [score(k, "karpathy") for k in range(4)] == [(0, 0), (0, 0), (0, 1), (1, 0)]
    # Per character (without the space): 13/3, 15/7 = 2.14, 18/9 = 2, 8/3: ending 2 again.
    assert [score(k, "lm_eval") for k in range(4)] == [(0, 0), (0, 0), (0, 1), (1, 0)]


def test_the_styles_normalise_by_tokens_and_by_characters(bytes_tokenizer):
    """"é" is one character and two bytes."""
    item = {**HELLASWAG_EXAMPLE, "endings": ["éé", "cccc", "cc", "c"], "label": 0}
    scores = []
    for style in hellaswag.STYLES:
        prepared = tokenize_examples([parse_example(item, style, "here")], bytes_tokenizer, 32, style)
        scores.append(prepared.lengths.tolist())
    assert scores == [[[5, 5, 3, 2]], [[2, 4, 2, 1]]]


@pytest.mark.parametrize("block_size", [8, 11, 500])
def test_an_ending_that_is_cut_counts_as_long_as_what_is_scored_of_it(bytes_tokenizer, block_size):
    item = {**HELLASWAG_EXAMPLE, "endings": ["a" * 9, "b" * 10, "c" * 30, "d"]}
    prepared = tokenize_examples([parse_example(item, "karpathy", "here")], bytes_tokenizer, block_size, "karpathy")
    scored = [int(k) for sequence in prepared.questions[0] for k in sequence.targets[2]]
    assert prepared.lengths.tolist() == [[scored.count(k) for k in range(4)]]
    assert prepared.lengths.tolist() == [[min(n, block_size) for n in (10, 11, 31, 2)]]


@torch.no_grad()
def brute_force(model, examples, tokenizer, style):
    """Return the summed loss of each ending (n, 4): one ending at a time, full logits, context cut from the left."""
    losses = np.zeros((len(examples), 4))
    for i, example in enumerate(examples):
        for k, ending in enumerate(example.endings):
            context = tokenizer.encode(example.context.rstrip() if style == "lm_eval" else example.context)
            tail = tokenizer.encode(" " + ending)
            if style == "lm_eval":
                tail = tokenizer.encode(example.context + " " + ending)[len(context):]
            window = torch.tensor([(context + tail)[-(model.config.block_size + 1):]])
            loss = F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="none")
            losses[i, k] = loss[-len(tail):].double().sum()
    return losses


@pytest.mark.parametrize("style", hellaswag.STYLES)
@pytest.mark.parametrize("block_size", [1024, 509, 100, 24])     # bytes: packed; some packed; all cut; endings cut too
def test_packed_sequences_score_as_one_ending_at_a_time(gpt, bytes_tokenizer, style, block_size):
    model, examples = gpt(block_size), load_hellaswag(HELLASWAG_FILE, style)
    prepared = tokenize_examples(examples, bytes_tokenizer, block_size, style)
    sequences_per_question = {len(sequences) for sequences in prepared.questions}
    assert sequences_per_question == {1024: {1}, 509: {1, 4}, 100: {4}, 24: {4}}[block_size]
    assert (prepared.n_cut > 0) == (block_size <= 100)
    losses = ending_losses(model, prepared.questions, 4, cpu_runtime()).reshape(-1, 4)
    expected = brute_force(model, examples, bytes_tokenizer, style)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    score = evaluate_hellaswag(model, prepared, cpu_runtime())
    labels = np.array([e.label for e in examples])
    assert score.acc == np.mean(expected.argmin(1) == labels)
    assert score.acc_norm == np.mean((expected / prepared.lengths).argmin(1) == labels)
    assert score.n == 20


def test_a_long_context_is_cut_from_the_left_only_as_far_as_each_ending_needs():
    context, endings = list(range(100, 110)), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
    sequences = pack_question(context, endings, 6)
    assert [s.inputs[0].tolist() for s in sequences] == [
        [106, 107, 108, 109, 1, 2], [104, 105, 106, 107, 108, 109], [5, 6, 7, 8, 9, 10], [105, 106, 107, 108, 109, 12]]
    assert [s.targets[1].tolist() for s in sequences] == [[1, 2, 3], [4], [6, 7, 8, 9, 10, 11], [12, 13]]
    assert [s.targets[0].tolist() for s in sequences] == [[3, 4, 5], [5], [0, 1, 2, 3, 4, 5], [4, 5]]
    assert [s.targets[2].tolist() for s in sequences] == [[k] * n for k, n in enumerate([3, 1, 6, 2])]
    packed, = pack_question(context[:4], endings, 14)
    assert packed.inputs[0].tolist() == [100, 101, 102, 103, 1, 2, 5, 6, 7, 8, 9, 10, 12]
    assert packed.inputs[1].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 4]
    assert len(pack_question(context[:4], endings, 12)) == 4


@torch.no_grad()
def transformers_score(model, tokenizer, path):
    """Return (acc, acc_norm) in karpathy style from a plain loop over transformers' model and tokenizer."""
    right = right_norm = n = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        sums, means = [], []
        for ending in item["endings"]:
            context = tokenizer(item["ctx"])["input_ids"]
            tail = tokenizer(" " + ending)["input_ids"]
            logits = model(torch.tensor([context + tail])).logits[0].double()
            losses = -logits.log_softmax(-1)[range(len(context) - 1, len(context) + len(tail) - 1), tail]
            sums.append(losses.sum())
            means.append(losses.mean())
        right += int(torch.stack(sums).argmin()) == item["label"]
        right_norm += int(torch.stack(means).argmin()) == item["label"]
        n += 1
    return right / n, right_norm / n


@pytest.fixture
def their_model(tiny_gpt2):
    return tiny_gpt2(scale=0.3, vocab_size=50257, n_positions=256)


@pytest.fixture
def their_tokenizer(tmp_path):
    from transformers import AutoTokenizer
    gpt2_tokenizer().save(tmp_path / "theirs")
    (tmp_path / "theirs" / "encoder.json").rename(tmp_path / "theirs" / "vocab.json")
    (tmp_path / "theirs" / "vocab.bpe").rename(tmp_path / "theirs" / "merges.txt")
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert len(tokenizer) == 50257
    return tokenizer


@pytest.mark.slow
def test_a_hugging_face_folder_scores_as_transformers_does(their_model, their_tokenizer, tmp_path, capsys):
    their_model.save_pretrained(tmp_path / "model")
    main(["--checkpoint", str(tmp_path / "model"), "--data", str(HELLASWAG_FILE), "--json", str(tmp_path / "out.json"),
          "--device", "cpu", "--dtype", "fp32"])
    result = json.loads((tmp_path / "out.json").read_text())
    expected = transformers_score(their_model, their_tokenizer, HELLASWAG_FILE)
    assert (result["acc"], result["acc_norm"]) == expected
    assert (result["n"], result["style"], result["dtype"], result["n_cut"]) == (20, "karpathy", "fp32", 0)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(expected[0] * (1 - expected[0]) / 19))
    out = capsys.readouterr().out
    assert f"this model   {expected[0]:.4f} ± {result['acc_stderr']:.4f}  {expected[1]:.4f}" in out
    assert "GPT-2 124M   0.2859           0.2955" in out and "20 examples (published numbers: 10,042)" in out


# -----------------------------------------------------------------------------
# batch size, order and number of ranks do not matter

def write_real_examples(folder, n):
    """Write a file with the first n examples of HellaSwag's validation split."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not on this machine")
    path = folder / "real.jsonl"
    with lzma.open(REAL, "rt", encoding="utf-8") as f:
        path.write_text("".join(line for line, _ in zip(f, range(n))), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_batch_size_and_order_do_not_change_the_score_of_real_examples(gpt, bytes_tokenizer, tmp_path, style):
    examples = load_hellaswag(write_real_examples(tmp_path, 120), style)
    model = gpt(640)
    scores = set()
    for batch_tokens in (1, 900, 20_000):
        for order in (1, -1):
            prepared = tokenize_examples(examples[::order], bytes_tokenizer, 640, style)
            score = evaluate_hellaswag(model, prepared, cpu_runtime(), batch_tokens)
            scores.add((score.acc, score.acc_norm))
    assert len(scores) == 1 and score.n == 120
    assert evaluate_hellaswag(model, prepared, cpu_runtime(dtype="bf16")).acc == pytest.approx(score.acc, abs=0.05)


@pytest.mark.slow
def test_all_of_hellaswag_loads_in_both_styles_and_gives_few_shapes(tmp_path):
    path = write_real_examples(tmp_path, 10042)
    for style in hellaswag.STYLES:
        prepared = tokenize_examples(load_hellaswag(path, style), gpt2_tokenizer(), 1024, style)
        batches = list(batch_by_length(prepared.questions, 1024, 8192, 1))
        assert len(prepared.questions) == 10042 and prepared.n_cut == 0
        assert sorted(i for _, indices in batches for i in indices) == list(range(10042))
        assert all(T % 16 == 0 and T * len(indices) <= 8192 for T, indices in batches)
        assert len({(T, len(indices)) for T, indices in batches}) <= 36
        assert [T for T, _ in batches] == sorted((T for T, _ in batches), reverse=True)


RANKS_SCRIPT = """
import json, sys
import torch
from dataclasses import dataclass
from evaluate import Document, score_documents
from exactgpt.config import DeviceConfig, UserError
from exactgpt import harness
from exactgpt.harness import continue_texts
from exactgpt.open_model import OpenedModel
from hellaswag import evaluate_hellaswag, load_hellaswag, prepare_hellaswag
from exactgpt.distributed import start
from model import GPT, GPTConfig
from exactgpt.tokenizer import Tokenizer

torch.manual_seed(3)
model = GPT(GPTConfig(640, 320, n_layer=1, n_head=2, n_embd=16)).train()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.3 * torch.randn(p.shape))
results = []
with start(DeviceConfig(device="cpu", dtype="fp32")) as runtime:
    for limit, batch_tokens in ((0, 0), (0, 700), (1, 0), (3, 1)):
        prepared = prepare_hellaswag(runtime, Tokenizer([], "bytes"), 640, path=sys.argv[1], limit=limit)
        score = evaluate_hellaswag(model, prepared, runtime, batch_tokens)
        results.append([score.acc, score.acc_norm, score.n])
    try:
        prepare_hellaswag(runtime, Tokenizer([], "bytes"), 640, path="nowhere.jsonl")
    except UserError as error:
        results.append(str(error))
    results.append(model.training)
    documents = [Document(text, None, 0, 0) for text in ("one", "a text of more than one window " * 60, "", "three")]
    model.eval()
    opened = OpenedModel(model, Tokenizer([], "bytes"), "")
    results.append(score_documents(opened, documents, None, runtime, batch_tokens=900).losses.tolist())
    requests = [(chr(97 + i), dict(until=["e"], max_gen_toks=3 + i % 2)) for i in range(19)]
    harness.GENERATION_ROWS = 4
    results.append(continue_texts(model, opened.tokenizer, requests, runtime))
    if runtime.rank == runtime.world_size - 1:
        with open(sys.argv[2], "w") as f:
            json.dump(results, f)
"""


@pytest.mark.slow
def test_two_processes_get_the_same_score_as_one(tmp_path):
    """Some batches leave a rank without an example. The last rank reports, so it must get the sums of the other."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS_SCRIPT)
    results = []
    for launcher in ([], torchrun_arguments(2)):
        out = tmp_path / f"{len(launcher)}.json"
        done = subprocess.run([sys.executable, *launcher, str(script), str(HELLASWAG_FILE), str(out)], cwd=ROOT,
                              text=True, env=script_env(tmp_path), capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(out.read_text()))
    assert results[0] == results[1]
    assert [r[2] for r in results[0][:4]] == [20, 20, 1, 3] and results[0][5] is True
    assert "cannot read nowhere.jsonl" in results[0][4]
    assert [loss > 0 for loss in results[0][6]] == [True, True, False, True]
    assert len(results[0][7]) == 19 and len(set(results[0][7])) > 4


# -----------------------------------------------------------------------------
# evaluation during training

def test_it_restores_the_models_mode_and_turns_dropout_off(gpt, bytes_tokenizer):
    model = gpt(640, dropout=0.5)
    prepared = tokenize_examples(load_hellaswag(HELLASWAG_FILE), bytes_tokenizer, 640, "karpathy")
    expected = evaluate_hellaswag(model, prepared, cpu_runtime())
    assert evaluate_hellaswag(model.train(), prepared, cpu_runtime()) == expected
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_signal_stops_it_after_a_batch(gpt, bytes_tokenizer):
    model = gpt(640).train()
    prepared = tokenize_examples(load_hellaswag(HELLASWAG_FILE), bytes_tokenizer, 640, "karpathy")
    signalled = cpu_runtime()
    signalled.stop_signal = "SIGTERM"
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(StopRequested):
        evaluate_hellaswag(model, prepared, signalled, batch_tokens=1)
    assert len(calls) == 1 and model.training


def test_in_a_compiled_run_it_is_not_compiled_and_causes_no_recompilation(gpt, bytes_tokenizer):
    raw = gpt(640).train()
    prepared = tokenize_examples(load_hellaswag(HELLASWAG_FILE), bytes_tokenizer, 640, "karpathy")
    expected = evaluate_hellaswag(raw, prepared, cpu_runtime())
    graphs = []
    compiled = torch.compile(raw, dynamic=False, backend=lambda module, _: graphs.append(1) or module.forward)
    x = torch.randint(0, 256, (2, 64))
    compiled(x, x).backward()
    before = len(graphs)
    assert before and evaluate_hellaswag(raw, prepared, cpu_runtime()) == expected
    compiled(x, x).backward()
    assert len(graphs) == before


def test_a_forced_attention_backend_is_kept(gpt, bytes_tokenizer):
    from exactgpt.device import enable_attention
    prepared = tokenize_examples(load_hellaswag(HELLASWAG_FILE), bytes_tokenizer, 640, "karpathy")
    expected = evaluate_hellaswag(gpt(640), prepared, cpu_runtime())
    try:
        enable_attention("cudnn")   # no CPU has it
        score = evaluate_hellaswag(gpt(640), prepared, cpu_runtime())
        assert (score.acc, score.acc_norm) == (expected.acc, expected.acc_norm)
        assert not torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        enable_attention("auto")


def test_a_model_with_nan_losses_scores_zero(gpt, bytes_tokenizer):
    model = gpt(640)
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    prepared = tokenize_examples(load_hellaswag(HELLASWAG_FILE), bytes_tokenizer, 640, "karpathy")
    score = evaluate_hellaswag(model, prepared, cpu_runtime())
    assert (score.acc, score.acc_norm, score.n) == (0, 0, 20)


def test_importing_loads_neither_datasets_nor_any_extra(run):
    code = ("import sys, hellaswag\n"
            "print({'datasets', 'transformers', 'huggingface_hub', 'pyarrow', 'lm_eval'} & set(sys.modules))")
    assert run("-c", code)[:2] == (0, "set()\n")
