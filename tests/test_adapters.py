"""LoRA adapters of others: merged whole, as peft does it, or refused in one line."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from exactgpt import hub
from exactgpt.config import UserError
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer
from model import GPT, GPTConfig
from tests.common import model_refusal, write_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapt(tmp_path):
    """adapt(**LoraConfig fields) -> the folder of an adapter, with random matrices, of a model in tmp_path/base."""
    def make(tied=True, **options):
        import peft
        torch.manual_seed(0)
        model = GPT(GPTConfig(8, 258, 2, 2, 8, tie_word_embeddings=tied))
        write_model(model, tmp_path / "base", Tokenizer([("a", "b")], ""))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["c_attn"], **options}))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        wrapped.save_pretrained(tmp_path / "adapter")
        change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
        return tmp_path / "adapter"
    return make


def change(folder, **entries):
    """Change entries of an adapter's config."""
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **entries}))


@pytest.mark.parametrize("options", [
    dict(), dict(target_modules=["c_attn", "c_proj", "c_fc"], lora_alpha=3), dict(use_rslora=True), dict(use_dora=True),
    dict(rank_pattern={"h.0.attn.c_attn": 1}), dict(modules_to_save=["ln_f"]),
    dict(tied=False, target_modules=["wte", "lm_head"]),
], ids=str)
def test_an_adapter_that_fits_is_merged_as_peft_merges_it(adapt, tmp_path, options):
    import peft
    folder = adapt(**options)
    base = open_model(tmp_path / "base")
    ids = torch.randint(258, (2, 8))
    before = base.model.eval()(ids)
    expected = peft.PeftModel.from_pretrained(base.model, str(folder)).eval()(ids)
    opened = open_model(folder).with_tokenizer()
    torch.testing.assert_close(opened.model.eval()(ids), expected, atol=1e-5, rtol=1e-5)
    assert options == dict(modules_to_save=["ln_f"]) or not torch.allclose(before, expected, atol=1e-2)


def rename(old, new):
    """Return a function that renames the tensors of an adapter."""
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("damage, message", [
    (rename("base_model.model.", ""), "tensors without a place there (4, such as transformer.h.0."),
    (rename("h.1.", "h.9."), "without a place there (2, such as base_model.model.transformer.h.9."),
    (rename("h.1.attn.c_attn", "h.1.mlp.c_fc"), "it has tensors without a place there (2, such"),
    (lambda weights: dict(sorted(weights.items())[:3]), "it has tensors missing that its config announces (1"),
    (lambda weights: {**weights, "base_model.model.transformer.wte.weight": torch.zeros(258, 8)}, "cannot be merged"),
    (lambda weights: {name: tensor.t().contiguous() for name, tensor in weights.items()}, "does not fit its model"),
    (lambda weights: {}, "r = 2 is not possible with the tensors"),
])
def test_an_adapter_that_does_not_fit_whole_is_not_applied(adapt, damage, message):
    folder = adapt()
    save_file(damage(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    assert message in model_refusal(folder)


def test_an_adapter_of_the_output_layer_alone_is_refused_where_the_layer_is_the_embedding(adapt):
    assert "changes the embedding or the output layer" in model_refusal(adapt(target_modules=["lm_head"]))


@pytest.mark.parametrize("entries, message", [
    *((dict(base_model_name_or_path=base), "does not name the model") for base in (None, "", 3, ["gpt2"], {})),
    *((dict(base_model_name_or_path=base), "cannot be downloaded from") for base in ("x" * 300, "a\0")),
    (dict(peft_type="IA3"), "peft_type = 'IA3' is not supported; only plain LORA adapters are"),
    (dict(peft_type=None), "peft_type = None is not supported"), (dict(peft_type=["LORA"]), "is not supported"),
    (dict(layer_replication=[[0, 10**9]]), "layer_replication is not supported"),
    (dict(megatron_config={}, megatron_core="os"), None), (dict(megatron_config={"a": 1}), "megatron_config is not"),
    *((dict(r=r), f"r = {r!r} is not possible") for r in (2**62, 0, -1, "2", None, True, 1.5)),
    *((dict(lora_alpha=alpha), f"lora_alpha = {alpha!r} is not possible") for alpha in ("x", math.nan, math.inf, None)),
    (dict(rank_pattern={"c_attn": 2**40}), "r = 1099511627776 is not"), (dict(rank_pattern=[1]), "r = [1] is not"),
    (dict(target_modules=3), "does not fit"), (dict(nonsense=1), None),
    (dict(target_modules=["nowhere"]), "does not fit its model"), (dict(target_modules=["c_attn", "c_fc"]), "missing"),
], ids=str)
def test_a_config_of_another_kind_is_refused(adapt, entries, message):
    folder = adapt()
    change(folder, **entries)
    if message is None:
        open_model(folder)
    else:
        assert message in model_refusal(folder)


def test_the_base_of_an_adapter_is_no_adapter(adapt, tmp_path):
    folder = adapt()
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG).write_text((folder / CONFIG).read_text())
    for base in (folder, other):
        change(folder, base_model_name_or_path=str(base))
        assert f"names {base} as its base model, which is itself an adapter" in model_refusal(folder)


def test_an_adapter_without_its_tensors_does_not_look_for_them_on_the_hub(adapt, monkeypatch):
    folder = adapt()
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("it looks for a network"))
    assert f"but no {WEIGHTS}; get the whole adapter" in model_refusal(folder)
    (folder / WEIGHTS).symlink_to("/proc/self/mem")
    assert "Input/output error" in model_refusal(folder)


def test_tensors_in_a_bin_file_are_read(adapt, tmp_path):
    folder = adapt()
    expected = open_model(folder).model.state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_model(folder).model.state_dict().items())


def test_a_tokenizer_beside_an_adapter_must_be_that_of_its_base(adapt):
    folder = adapt()
    (folder / "added_tokens.json").write_text('{"<|user|>": 258}')
    with pytest.raises(UserError, match=r"cannot be used here, because it has added_tokens\.json without a vocabulary"):
        open_model(folder).with_tokenizer()
    (folder / "added_tokens.json").unlink()
    for merges, fits in (([("a", "b")], True), ([("a", "c")], False)):
        Tokenizer(merges, "").save(folder)
        opened = open_model(folder)
        assert bool(opened.tokenizer) == fits and opened.tokenizer_problem == ("" if fits else "it is not that of the "
                                                                                               "base model")
