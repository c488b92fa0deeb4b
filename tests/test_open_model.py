"""open_model.py: transformers' files are read, unsupported models are errors, and written files equal transformers'."""
import http.server
import json
import re
import shutil
import socket
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from exactgpt.classifier import Classifier, ClassifierConfig
from exactgpt.config import UserError
from exactgpt.huggingface import read_pretrained
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer, train_tokenizer
from model import GPT, GPTConfig
from tests.common import in_our_layout, write_model

IDS = torch.randint(65, (2, 32), generator=torch.Generator().manual_seed(0))


def refusal(folder):
    """Return the error of opening a folder, on one line."""
    with pytest.raises(UserError) as caught:
        open_model(folder)
    return " ".join(str(caught.value).split())


@pytest.fixture
def saved(tiny_gpt2, tmp_path):
    """saved(**GPT2Config fields) -> (transformers' model, the folder that its save_pretrained wrote)."""
    def save(**options):
        model = tiny_gpt2(**options)
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"
    return save


def change_json(path, **entries):
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **entries}.items() if v != "absent"}))


@pytest.mark.parametrize("options", [
    {}, dict(tie_word_embeddings=False), dict(activation_function="gelu"), dict(activation_function="relu"),
    dict(layer_norm_epsilon=1e-3), dict(n_inner=96),
], ids=str)
def test_a_saved_transformers_model_has_equal_weights_and_logits(saved, options):
    theirs, folder = saved(**options)
    ours = open_model(folder).model.eval()
    for name, parameter in ours.named_parameters():
        expected = in_our_layout(theirs, name, theirs.get_parameter(name))
        torch.testing.assert_close(parameter, expected, atol=0, rtol=0, msg=name)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_keys_without_prefix_stored_masks_and_a_copied_head_are_accepted(saved):
    """The hub's "gpt2" file: GPT2Model's names, causal masks as buffers; other files also store the tied head."""
    theirs, folder = saved()
    stored = load_file(folder / "model.safetensors")
    weights = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    ours = open_model(folder).model.eval()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_stored_head_that_differs_overrides_the_config(saved):
    theirs, folder = saved(tie_word_embeddings=False)
    change_json(folder / "config.json", tie_word_embeddings=True)
    ours = open_model(folder).model.eval()
    torch.testing.assert_close(ours.lm_head.weight, theirs.lm_head.weight, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_fp32(saved, dtype):
    _, folder = saved()
    weights = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    ours = open_model(folder).model
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.transformer.wpe.weight, weights["transformer.wpe.weight"].float(), atol=0, rtol=0)


def test_labels_come_in_the_order_of_their_numbers_whatever_that_of_the_file(tmp_path):
    labels = [f"label {i}" for i in range(12)]
    write_model(Classifier(ClassifierConfig(8, 65, 1, 1, 4, labels=labels)), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    change_json(path, id2label=dict(sorted(json.loads(path.read_text())["id2label"].items())))     # "10" before "2"
    assert open_model(tmp_path / "hf", classifiers=True).model.config.labels == labels


def test_pytorch_model_bin_is_read_if_there_is_no_safetensors(saved):
    theirs, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    torch.testing.assert_close(open_model(folder).model.eval()(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_trained_gpt_nano_gives_transformers_logits(gpt_nano):
    from transformers import GPT2LMHeadModel
    theirs = GPT2LMHeadModel.from_pretrained(gpt_nano).eval()
    ours = open_model(gpt_nano).model.eval()
    assert ours.n_params() == 85_728 and not ours.config.tie_word_embeddings
    ids = torch.tensor([[2, 1, 0, 0, 1, 2, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1]])
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entries, message", [
    (dict(model_type="llama"), "model_type = 'llama' is not supported; only ['gpt2']"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
    (dict(scale_attn_weights=False), "scale_attn_weights = False is not supported"),
    (dict(add_cross_attention=True), "add_cross_attention = True is not supported"),
    (dict(n_inner=100), "n_inner = 100 is not supported"),
    (dict(activation_function="silu"), "activation_function = 'silu' is not supported; only ['gelu_new', "),
    (dict(n_embd="absent"), "is not the config of a GPT-2 model ('n_embd')"),
    (dict(n_head=5), "n_embd (24) must be a multiple of n_head (5)"),
    (dict(n_layer=3), "missing weight transformer.h.2."),
    (dict(n_layer=1), "unknown weight transformer.h.1."),
    (dict(vocab_size=66), "has shape (65, 24), expected (66, 24)"),
    (dict(n_positions=None), "block_size must be a whole number"),
], ids=lambda value: str(value)[:40])
def test_an_unsupported_config_is_an_error_that_says_why(saved, entries, message):
    _, folder = saved()
    change_json(folder / "config.json", **entries)
    assert message in refusal(folder) and str(folder) in refusal(folder)


@pytest.mark.parametrize("text, message", [
    ("{", "is not valid JSON"), ("[]", "must hold a JSON dict"), (None, "no model_XXXXX.pt below"),
])
def test_a_damaged_or_missing_config_is_named(saved, text, message):
    _, folder = saved()
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    assert message in refusal(folder) and "config.json" in refusal(folder)


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"\xff" * 64 + data[64:],
    lambda data: b"hello" * 99,
], ids=["truncated", "empty", "header", "text"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_one_line(saved, damage, file):
    theirs, folder = saved()
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / file)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    assert re.search(f"cannot (read the (weights in|checkpoint)|load) {folder / file}", refusal(folder))


def test_weights_of_something_else_are_one_line(saved):
    _, folder = saved()
    weights = load_file(folder / "model.safetensors")
    head_alone = {"lm_head.weight": weights.pop("transformer.wte.weight"), **weights}
    save_file(head_alone, folder / "model.safetensors")
    assert "missing weight transformer.wte.weight" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in refusal(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert f"cannot load {folder / 'pytorch_model.bin'}" in refusal(folder)
    torch.save({"wte.weight": 1.0}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin holds something else than a dict of tensors" in refusal(folder)


def test_a_hub_name_without_network_mentions_the_network():
    """conftest sets HF_HUB_OFFLINE: the hub is not reached, and nothing is in the cache."""
    message = refusal("no-such-user-of-ours/gpt2-of-nobody")
    assert "check the name and the network" in message and "config.json and model.safetensors" in message


def test_an_invalid_hub_name_is_an_error(tmp_path):
    assert "is no folder and cannot be downloaded" in refusal(tmp_path / "no" / "such" / "folder")


def test_reading_changes_no_file(saved, tmp_path):
    _, folder = saved()
    shutil.copytree(folder, tmp_path / "copy")
    read_pretrained(folder)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


# -----------------------------------------------------------------------------
# the hub, and what is written

class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that serves the files of one model: {path: bytes} in `files`."""
    files, asked = {}, []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.asked.append(self.path)
        name, commit = self.path.split("/")[-1], "0123456789abcdef0123456789abcdef01234567"
        if self.path.startswith("/api/models/gpt2/revision/"):
            data = json.dumps({"id": "gpt2", "sha": commit, "siblings": []}).encode()
        elif self.path.startswith("/api/models/gpt2/tree/"):
            data = json.dumps([{"type": "file", "path": path, "size": len(data), "oid": path}
                               for path, data in self.files.items()]).encode()
        else:
            data = self.files[name] if name else b""       # hub.reachable() asks for /
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def do_GET(self):
        self.wfile.write(self.do_HEAD())


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary, weights", [
    (["merges.txt", "vocab.json"], "model.safetensors"), (["tokenizer.json"], "model.safetensors.index.json"),
    ([], "pytorch_model.bin")], ids=str)
def test_a_hub_name_downloads_config_weights_and_vocabulary_only(run, tmp_path, vocabulary, weights):
    torch.manual_seed(0)
    tokenizer = Tokenizer([("a", "b"), ("Ġ", "ab")], "") if vocabulary else None
    model = GPT(GPTConfig(8, 50257 if tokenizer is None else tokenizer.n_vocab, 1, 2, 8))
    write_model(model, tmp_path / "model", tokenizer)
    others = {"merges.txt", "vocab.json", "tokenizer.json"} - set(vocabulary)
    Hub.files = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir() if f.name not in others}
    Hub.files |= {"README.md": b"", "onnx/model.onnx": b""}
    if weights == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / weights)
        Hub.files[weights] = (tmp_path / weights).read_bytes()
        del Hub.files["model.safetensors"]
    parts = {}
    if weights.endswith("index.json"):
        whole = load_file(tmp_path / "model" / "model.safetensors")
        parts = {f"model-{i}.safetensors": {name: whole[name] for name in sorted(whole)[i::2]} for i in range(2)}
        weight_map = {name: file for file, tensors in parts.items() for name in tensors}
        Hub.files[weights] = json.dumps({"weight_map": weight_map}).encode()
        Hub.files |= {file: save(tensors) for file, tensors in parts.items()}
        del Hub.files["model.safetensors"]
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = """
from exactgpt.open_model import open_model
opened = open_model("gpt2")
print(opened.source, opened.model.transformer.wte.weight.double().sum().item(), opened.tokenizer.encode(" ab"))
"""
        env = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}", HF_HUB_OFFLINE="0",
                   HF_HOME=str(tmp_path / "home"))
        rc, out, err = run("-c", code, env=env)
        server.shutdown()
    assert rc == 0, err
    ids = [257] if vocabulary else gpt2_tokenizer().encode(" ab")
    assert out == f"gpt2 {model.transformer.wte.weight.double().sum().item()} {ids}\n"
    for gone in ({}, dict(http_proxy="http://127.0.0.1:9")):     # the hub is gone: the download still works
        assert run("-c", code, env={**env, **gone})[:2] == (0, out)
    files = {path.split("/")[-1] for path in Hub.asked if "/resolve/" in path}
    settings = {"tokenizer_config.json", "special_tokens_map.json"} if vocabulary else set()
    assert files == {"config.json", weights, *parts, *vocabulary, *settings}


@pytest.mark.parametrize("options", [
    {}, dict(tie_word_embeddings=False), dict(activation_function="gelu"), dict(activation_function="relu"),
    dict(layer_norm_epsilon=1e-3),
], ids=str)
def test_written_tensors_and_settings_equal_those_of_transformers(saved, tmp_path, options):
    _, folder = saved(**options)
    write_model(open_model(folder).model, tmp_path / "ours")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "ours"))
    ours.pop("n_ctx")       # of older versions
    assert {k: theirs.get(k) for k in ours} == {**ours, "bos_token_id": 0}
    modes = {file.stat().st_mode for file in (tmp_path / "ours").iterdir()}
    assert len(modes) == 1, "safetensors lets only the owner read its file"


def test_padding_rows_are_omitted_and_absent_biases_become_zeros(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer([("a", "b")], "")
    model = GPT(GPTConfig(8, 320, 1, 2, 8, bias=False, activation="gelu", dropout=0.1)).eval()
    write_model(model, tmp_path / "hf", tokenizer)
    again = open_model(tmp_path / "hf").model.eval()
    assert again.config == GPTConfig(8, 258, 1, 2, 8, activation="gelu", padded=False)
    for name, parameter in again.named_parameters():
        expected = dict(model.named_parameters()).get(name, torch.zeros_like(parameter))
        assert torch.equal(parameter, expected[:258] if name == "transformer.wte.weight" else expected), name
    ids = torch.randint(258, (2, 8))
    torch.testing.assert_close(again(ids), model(ids)[..., :258], atol=1e-6, rtol=1e-6)


def test_the_tokenizer_files_are_read_by_every_reader(tmp_path, monkeypatch):
    """A trained vocabulary with special letters: by ours from either file, by transformers without a network."""
    from transformers import AutoTokenizer
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it looks for a network"))
    texts = ["the cat, the hat; the d\u00e9j\u00e0 vu\n\n  the 2024 \u6771\u4eac don't\t!"] * 3
    tokenizer = train_tokenizer(texts, 300)
    model = GPT(GPTConfig(8, 320, 1, 2, 8))
    write_model(model, tmp_path / "hf", tokenizer)
    text = texts[0] + " unseen \U0001f600 \x00\x7f words"
    for changed in ("", "merges.txt", "tokenizer.json"):
        folder = tmp_path / f"without {changed}"
        shutil.copytree(tmp_path / "hf", folder)
        if changed:
            (folder / changed).unlink()
        read = AutoTokenizer.from_pretrained(folder)
        assert read(text)["input_ids"] == tokenizer.encode(text)
        assert read.decode(tokenizer.encode(text)) == text
        assert (read.eos_token_id, read.model_max_length, len(read)) == (tokenizer.eot, 8, tokenizer.n_vocab)
        ours = open_model(folder).tokenizer
        assert (ours.name, ours.merges) == (tokenizer.name, tokenizer.merges) and ours.name.startswith("bpe-")
    for file in ("merges.txt", "vocab.json", "tokenizer.json"):
        (tmp_path / "hf" / file).unlink()
    tokenizer.save(tmp_path / "hf")                  # vocab.bpe, as beside our shards
    assert open_model(tmp_path / "hf").tokenizer.merges == tokenizer.merges


def test_gpt2s_vocabulary_is_recognised_by_its_merges_and_damaged_ones_are_named(tmp_path):
    model, gpt2 = GPT(GPTConfig(8, 50304, 1, 2, 8)), gpt2_tokenizer()
    write_model(model, tmp_path / "hf", gpt2)
    assert open_model(tmp_path / "hf").tokenizer.name == "gpt2"
    tokenizer = Tokenizer([("a", "b")], "")
    write_model(GPT(GPTConfig(8, 320, 1, 2, 8)), tmp_path / "own", tokenizer)
    for file, damage, message in (("merges.txt", b"a b c\n", "its merges.txt is not a list of byte-pair merges"),
                                  ("merges.txt", b"\xff", "merges.txt is not UTF-8"),
                                  ("tokenizer_config.json", b'{"pad_token": 3}', "cannot read the tokenizer in"),
                                  ("added_tokens.json", b"[]", "added_tokens.json must hold a JSON dict"),
                                  ("added_tokens.json", b"{}", "cannot read the tokenizer in"),
                                  ("vocab.json", b"{", "vocab.json is not valid JSON")):
        (tmp_path / "own" / file).write_bytes(damage)
        with pytest.raises(UserError, match=message):
            open_model(tmp_path / "own").with_tokenizer()


def test_only_a_new_or_empty_folder_is_written(tmp_path):
    model = GPT(GPTConfig(8, 65, 1, 2, 8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=r"already exists .*; choose another name"):
            write_model(model, tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tmp").mkdir()                                 # somebody else's
    write_model(model, tmp_path / "empty")
    assert {f.name for f in (tmp_path / "empty").iterdir()} == {"config.json", "generation_config.json",
                                                                "model.safetensors"}
    assert {f.name for f in tmp_path.iterdir()} == {"full", "file", "empty", "empty.tmp"}


def test_a_failed_write_leaves_nothing_behind(run, tmp_path):
    rc, out, err = run("-c", f"""
import resource
from exactgpt.config import run_script
from exactgpt.huggingface import write_pretrained
from model import GPT, GPTConfig
model = GPT(GPTConfig(8, 65, 8, 2, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_script(lambda: write_pretrained({str(tmp_path / "hf")!r}, model.config_dict(), model.state_dict()))""")
    assert (rc, out) == (2, "") and len(err.splitlines()) == 1 and "cannot write the weights in" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", [None, [], "BPE", {"type": "BPE"}, {"merges": [1], "vocab": {}}])
def test_a_damaged_tokenizer_json_is_one_line(tmp_path, model):
    write_model(GPT(GPTConfig(8, 320, 1, 2, 8)), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(
        json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}))
    assert f"cannot read the tokenizer in {tmp_path / 'hf'}" in refusal(tmp_path / "hf")
