"""Weights of Hugging Face folders, whole or in parts: each is there once, or one line says what is wrong."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from exactgpt.open_model import open_model
from model import GPT, GPTConfig
from tests.common import model_refusal, write_model
from tests.folders import split_bin

INDEX = "model.safetensors.index.json"
PARTS = ["model-1.safetensors", "model-2.safetensors"]
EMBEDDING = "transformer.wte.weight"


@pytest.fixture
def whole(tmp_path):
    """(model, its folder)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 65, 1, 2, 8))
    write_model(model, tmp_path / "hf")
    return model, tmp_path / "hf"


@pytest.fixture
def parts(whole):
    """(folder, its index): the embedding in the first of PARTS, the rest in the second."""
    _, folder = whole
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: PARTS[name != EMBEDDING] for name in weights}
    for part in PARTS:
        save_file({name: tensor for name, tensor in weights.items() if index[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder, index


def test_parts_of_both_formats_are_read_to_the_bit_and_nothing_of_them_changes(whole, parts):
    model, folder = whole
    for _ in range(2):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        state = open_model(folder).model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert before == {path: path.read_bytes() for path in folder.iterdir()}
        if (folder / INDEX).exists():
            save_file({name: t for part in PARTS for name, t in load_file(folder / part).items()},
                      folder / "model.safetensors")
            (folder / INDEX).unlink()
            split_bin(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda folder, index: (folder / PARTS[1]).unlink(), "lacks model-2.safetensors of the 2 files that model.saf"),
    (lambda folder, index: save_file({}, folder / PARTS[0]), f"lacks {EMBEDDING}, which {INDEX} lists"),
    (lambda folder, index: save_file({EMBEDDING: torch.ones(2), "x": torch.ones(2)}, folder / PARTS[0]),
     f"contains x, but {INDEX} does not list it there"),
    (lambda folder, index: index.update({EMBEDDING: PARTS[1]}), f"lacks {EMBEDDING}, which"),
    (lambda folder, index: index.update({"x\ny": PARTS[0]}), "does not list which .safetensors file"),
    (lambda folder, index: save_file({"x\ny": torch.ones(2)}, folder / PARTS[0]), "holds something else than a dict"),
    *((lambda folder, index, place=place: index.update({EMBEDDING: place}), "does not list which .safetensors file")
      for place in ("../hf/model-1.safetensors", "/etc/model-1.safetensors", "model-1.bin", "", ".safetensors", 1,
                    f"{300 * chr(97)}.safetensors")),
    (lambda folder, index: index.clear(), "does not list which .safetensors file"),
])
def test_a_part_that_is_not_what_the_index_says_is_named(parts, damage, message):
    folder, index = parts
    damage(folder, index)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert message in model_refusal(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": null}', "[]", "{"])
def test_a_damaged_index_is_one_line(parts, text):
    (parts[0] / INDEX).write_text(text)
    assert INDEX in model_refusal(parts[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_that_are_no_usual_numbers_are_refused(whole, dtype, suffix):
    folder = whole[1]
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"] = torch.ones(8, 8).to(dtype)
    if suffix == ".bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    problem = f"the weight transformer.wpe.weight holds {str(dtype)[6:]}, not floating-point numbers"
    assert problem in model_refusal(folder)


def test_a_weight_with_and_without_the_prefix_is_refused(whole):
    weights = load_file(whole[1] / "model.safetensors")
    save_file({**weights, "wpe.weight": torch.ones(8, 8)}, whole[1] / "model.safetensors")
    assert "the weight transformer.wpe.weight is there twice" in model_refusal(whole[1])


@pytest.mark.parametrize("tensor", [torch.eye(8).to_sparse(), torch.ones(8, 8, device="meta"),
                                    torch.ones(1).expand(8, 8)], ids=["sparse", "meta", "stride 0"])
def test_tensors_that_take_no_room_in_the_file_are_refused(whole, tensor):
    (whole[1] / "model.safetensors").unlink()
    torch.save({"wpe.weight": tensor}, whole[1] / "pytorch_model.bin")
    assert "pytorch_model.bin will not be loaded" in model_refusal(whole[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json"])
def test_a_file_that_the_disk_cannot_read_is_one_line(whole, name):
    folder = whole[1]
    (folder / "model.safetensors").unlink() if name == "pytorch_model.bin" else None
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")      # nothing is mapped at its beginning: EIO
    message = model_refusal(folder)
    assert f"{folder / name}" in message and "Input/output error" in message


@pytest.mark.parametrize("name", ["n_embd", "vocab_size", "n_positions", "n_layer", "n_head", "n_inner"])
@pytest.mark.parametrize("size", [2**62, 2**64, 10**40, -1, 1.5, "8", True, float("inf")], ids=str)
def test_a_size_that_no_model_has_is_one_line(whole, name, size):
    path = whole[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: size}))
    model_refusal(whole[1])
