"""hf_format.py: what transformers writes is read, what our model does not compute is refused."""
import json
import shutil

import pytest
import torch
from conftest import in_our_layout
from safetensors.torch import load_file, save_file

import hf_format
from config import UserError
from model import GPT

IDS = torch.randint(65, (2, 32), generator=torch.Generator().manual_seed(0))


def refusal(folder):
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(folder)
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
def test_a_saved_transformers_model_is_read_bit_for_bit_and_computes_the_same(saved, options):
    theirs, folder = saved(**options)
    ours = GPT.from_pretrained(folder).eval()
    for name, parameter in ours.named_parameters():
        expected = in_our_layout(theirs, name, theirs.get_parameter(name))
        torch.testing.assert_close(parameter, expected, atol=0, rtol=0, msg=name)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_keys_without_prefix_stored_masks_and_a_copied_head_are_understood(saved):
    """The hub's "gpt2" file: GPT2Model's names, causal masks as buffers; others store the tied head besides."""
    theirs, folder = saved()
    stored = load_file(folder / "model.safetensors")
    weights = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    ours = GPT.from_pretrained(folder).eval()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_stored_head_that_differs_is_kept_whatever_the_config_says(saved):
    theirs, folder = saved(tie_word_embeddings=False)
    change_json(folder / "config.json", tie_word_embeddings=True)
    ours = GPT.from_pretrained(folder).eval()
    torch.testing.assert_close(ours.lm_head.weight, theirs.lm_head.weight, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_fp32(saved, dtype):
    _, folder = saved()
    weights = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    ours = GPT.from_pretrained(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.transformer.wpe.weight, weights["transformer.wpe.weight"].float(), atol=0, rtol=0)


def test_pytorch_model_bin_is_read_where_there_is_no_safetensors(saved):
    theirs, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    torch.testing.assert_close(GPT.from_pretrained(folder).eval()(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_trained_gpt_nano_gives_transformers_logits(gpt_nano):
    from transformers import GPT2LMHeadModel
    theirs = GPT2LMHeadModel.from_pretrained(gpt_nano).eval()
    ours = GPT.from_pretrained(gpt_nano).eval()
    assert ours.n_params() == 85_728 and not ours.config.tie_word_embeddings
    ids = torch.tensor([[2, 1, 0, 0, 1, 2, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1]])
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entries, message", [
    (dict(model_type="llama"), "describes a 'llama' model; only gpt2 is read"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
    (dict(scale_attn_weights=False), "scale_attn_weights = False is not supported"),
    (dict(add_cross_attention=True), "add_cross_attention = True is not supported"),
    (dict(n_inner=100), "n_inner = 100 is not supported"),
    (dict(activation_function="silu"), "activation_function 'silu' is not supported"),
    (dict(n_embd="absent"), "is not the config of a GPT-2 model ('n_embd')"),
    (dict(n_head=5), "n_embd (24) must be a multiple of n_head (5)"),
    (dict(n_layer=3), "missing weight transformer.h.2."),
    (dict(n_layer=1), "unknown weight transformer.h.1."),
    (dict(vocab_size=66), "has shape (65, 24), expected (66, 24)"),
    (dict(n_positions=None), "block_size must be a whole number"),
], ids=lambda value: str(value)[:40])
def test_a_config_that_we_do_not_compute_is_refused_with_its_reason(saved, entries, message):
    _, folder = saved()
    change_json(folder / "config.json", **entries)
    assert message in refusal(folder) and str(folder) in refusal(folder)


@pytest.mark.parametrize("text, message", [
    ("{", "is not valid JSON"), ("[]", "must hold a JSON dict"), (None, "cannot read"),
])
def test_a_damaged_or_absent_config_is_named(saved, text, message):
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
    assert f"cannot read the weights in {folder}" in refusal(folder)


def test_weights_of_something_else_are_one_line(saved):
    _, folder = saved()
    weights = load_file(folder / "model.safetensors")
    head_alone = {"lm_head.weight": weights.pop("transformer.wte.weight"), **weights}
    save_file(head_alone, folder / "model.safetensors")
    assert "missing weight transformer.wte.weight" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in refusal(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "holds a list, not a dict" in refusal(folder)
    torch.save({"wte.weight": 1.0}, folder / "pytorch_model.bin")
    assert "entry 'wte.weight' is not a tensor" in refusal(folder)


def test_a_name_without_network_speaks_of_the_network():
    """conftest sets HF_HUB_OFFLINE: the hub is not reached, and nothing is in the cache."""
    message = refusal("no-such-user-of-ours/gpt2-of-nobody")
    assert "check the name and the network" in message and "config.json and model.safetensors" in message


def test_a_name_that_cannot_be_on_the_hub_is_called_so(tmp_path):
    assert "is neither a folder nor a model" in refusal(tmp_path / "no" / "such" / "folder")


def test_reading_changes_no_file(saved, tmp_path):
    _, folder = saved()
    shutil.copytree(folder, tmp_path / "copy")
    hf_format.read_pretrained(folder)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()
