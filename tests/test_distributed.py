"""distributed.py, where no process is needed: what is sent from rank 0, and where it lies then."""
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from exactgpt import checkpoint
from exactgpt.device import Hardware
from exactgpt.distributed import Runtime


@pytest.mark.parametrize("on_device, where", [(True, "meta"), (False, "cpu")])
def test_the_other_ranks_hold_what_rank_0_read_on_their_cards_if_asked_to(monkeypatch, on_device, where):
    """So a node holds a checkpoint once in memory, not once a rank. The card is torch's "meta" device here."""
    sent = {"optimizer": {"state": [torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16)]}, "step": 7}

    def answered(box, src):          # as rank 0 would have filled it
        box[0] = pickle.loads(pickle.dumps(tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), sent)))
    monkeypatch.setattr(dist, "all_gather_object", lambda problems, problem: None)
    monkeypatch.setattr(dist, "broadcast_object_list", answered)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: arrived.append(tensor.device.type))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    arrived = []
    rank_1 = Runtime(1, 1, 2, torch.device("meta"), Hardware("cuda"), "bf16")
    received = rank_1.broadcast(lambda: pytest.fail("only rank 0 reads the file"), on_device=on_device)
    assert received["step"] == 7 and arrived == ["meta", "meta"]
    for tensor, original in zip(received["optimizer"]["state"], sent["optimizer"]["state"]):
        assert (tensor.device.type, tensor.shape, tensor.dtype) == (where, original.shape, original.dtype)


def test_the_hash_of_the_code_covers_scripts_and_package_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "exactgpt").mkdir()
    (tmp_path / "tests").mkdir()
    files = ("train.py", "exactgpt/checkpoint.py", "tests/test_train.py")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "exactgpt" / "checkpoint.py"))
    hashes = [checkpoint.code_hash()]
    for file in files:
        (tmp_path / file).write_text("x = 1")
        hashes.append(checkpoint.code_hash())
    assert len({*hashes[:3]}) == 3 and hashes[3] == hashes[2]
    (tmp_path / "train.py").rename(tmp_path / "exactgpt" / "train.py")       # the same words in another place
    assert checkpoint.code_hash() not in hashes
