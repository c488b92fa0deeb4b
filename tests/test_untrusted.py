"""Files that ask for more than they are, and disks that cannot be read: one line, where the file is read."""
import zipfile

import pytest
import torch

from exactgpt.checkpoint import read_checkpoint
from exactgpt.documents import read_documents, read_rows
from exactgpt.files import read_json, read_text
from exactgpt.open_model import open_model
from exactgpt.shards import ShardFolder
from hellaswag import load_hellaswag
from tests.common import refusal, write_shards
from tests.fuzz import make_pretrained


def endless_list():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("value, problem", [
    (torch.zeros(1).expand(100_000, 100_000), "a tensor whose elements share memory"),
    (torch.zeros(8).as_strided((5, 4), (1, 1)), "a tensor whose elements share memory"),
    (torch.eye(3).to_sparse(), "a tensor that is sparse, quantized or without data"),
    (torch.empty(10**10, device="meta"), "a tensor that is sparse, quantized or without data"),
    (dict.fromkeys(range(99), torch.zeros(99)), "its tensors take"),
    (endless_list(), "more than 200,000 values"),
], ids=["expanded", "overlapping", "sparse", "meta", "the same many times", "endless"])
def test_a_few_bytes_that_stand_for_many_are_refused(value, problem, tmp_path):
    torch.save({"model": value}, tmp_path / "x.pt")
    assert f"x.pt will not be loaded: it contains {problem}".replace("it contains its", "its") in refusal(
        read_checkpoint, tmp_path / "x.pt")


def test_a_tied_layer_and_transposed_weights_are_no_more_than_the_file_has(tmp_path):
    weight = torch.rand(20, 30)
    state = dict(a=weight, b=weight, c=torch.rand(6, 5, 4).permute(2, 0, 1), d=weight[:, ::2], e=torch.ones(()))
    torch.save({"model": state}, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")["model"]
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"model": {"a": torch.zeros(250_000)}}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    assert "x.pt will not be loaded: it unpacks to more than its size" in refusal(read_checkpoint, tmp_path / "x.pt")


UNREADABLE = "/proc/self/mem"      # reading its first bytes is an EIO


@pytest.mark.parametrize("name, read", [
    ("x.pt", open_model), ("x.pt", read_checkpoint), ("x.json", read_json), ("x.txt", read_text),
    *((f"x{suffix}", lambda path: list(read_documents(path))) for suffix in (".txt", ".md")),
    *((f"x{suffix}", lambda path: list(read_rows(path, ["text"])))
      for suffix in (".jsonl", ".json", ".csv", ".tsv")),
    ("x.jsonl", lambda path: load_hellaswag(path, "karpathy")),
    *((name, lambda path: ShardFolder(path.parent)) for name in (
        "manifest.json", "x_val_000000.npy", "x_val_000000.bin")),
])
def test_a_disk_that_cannot_be_read_is_one_line(name, read, tmp_path):
    (tmp_path / name).symlink_to(UNREADABLE)
    message = refusal(read, tmp_path / name)
    assert message.startswith(("cannot read", "cannot load")) and name in message and "Input/output error" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "vocab.json"])
def test_a_model_on_a_disk_that_cannot_be_read_is_one_line(file, tmp_path):
    make_pretrained(tmp_path)
    (tmp_path / "hf" / file).unlink()
    (tmp_path / "hf" / file).symlink_to(UNREADABLE)
    assert "hf" in refusal(open_model, tmp_path / "hf")


def test_a_shard_that_cannot_be_read_any_more_is_named(tmp_path):
    shards = ShardFolder(write_shards(tmp_path / "shards", [200]))
    shard = shards.train[0]
    path = shard.path
    path.unlink()
    path.symlink_to(UNREADABLE)
    assert refusal(shards.check_vocabulary, 257) == f"cannot read shard {path}: Input/output error"
    assert refusal(shards.verify, 257) == f"cannot read shard {path}: Input/output error"
