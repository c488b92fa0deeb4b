"""distributed.py: what is sent from rank 0, and where it lies then; what two ranks come to together."""
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from exactgpt import checkpoint
from exactgpt.device import Hardware
from exactgpt.distributed import Runtime
from exactgpt.optimizer import StepResult
from exactgpt.tokenizer import Tokenizer
from tests import two_ranks
from tests.common import cpu_runtime, write_shards


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


# -----------------------------------------------------------------------------
# two ranks (two_ranks.py), compared with one

@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory):
    """The findings of both ranks; `data` is their folder of shards."""
    folder = tmp_path_factory.mktemp("ranks")
    tokens = np.random.default_rng(0).integers(240, 259, two_ranks.VAL_TOKENS + 900)      # many without one byte
    data = write_shards(folder / "shards", [900], val_sizes=[two_ranks.VAL_TOKENS], tokens=tokens,
                        tokenizer=Tokenizer([("a", "b"), ("ab", "ab")], "own"))
    codes, output = run_ranks(2, "tests/two_ranks.py", data, folder / "rank", timeout=60)
    assert codes == [0, 0], output
    with torch.serialization.safe_globals([StepResult]):
        return [dict(torch.load(folder / f"rank{rank}.pt"), data=data) for rank in (0, 1)]


def test_the_validation_loss_is_the_mean_over_all_tokens_of_all_ranks(found):
    """One rank has a window less than the other, so it is not the mean of their means."""
    [shard] = found[0]["data"].glob("*_val_*.npy")
    tokens = torch.from_numpy(np.load(shard).astype(np.int64))
    logits = two_ranks.random_gpt().eval()(tokens[:-1].view(7, 8))
    each = F.cross_entropy(logits.flatten(0, 1), tokens[1:], reduction="none").view(7, 8).mean(1)
    assert each.std() > 0.1                                   # so whose windows they are matters
    n_bytes = [{256: 2, 257: 4, 258: 0}.get(token, 1) for token in tokens[1:].tolist()]       # 258: end-of-text
    assert {0, 1, 2, 4} == set(n_bytes)
    for rank in found:
        assert rank["validated"] == (pytest.approx(each.mean().item(), rel=1e-5), 56, sum(n_bytes))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_two_ranks_is_that_of_one_and_leaves_both_with_the_same_weights(found, optimizer):
    result, weights, _ = two_ranks.trained(cpu_runtime(), optimizer)
    (first, one, _), (second, other, _) = (rank["trained"][optimizer] for rank in found)
    assert first == second and (first.loss, first.grad_norm) == pytest.approx((result.loss, result.grad_norm), rel=1e-5)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(one, weights, rtol=1e-4, atol=1e-5)


def test_a_stop_that_one_rank_was_asked_for_is_heard_by_all(found):
    for rank in found:
        assert rank["stops"] == [True, True, False]
        assert [stopping for _, _, stopping in rank["trained"].values()] == [True, True]     # at the end of a step


@pytest.mark.parametrize("what", ["flags", "code", "token shards", "fine-tuning flags", "examples"])
def test_ranks_that_were_started_differently_refuse_to_train(found, what):
    messages = [rank["refusals"][what] for rank in found]
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"other {what.removeprefix('fine-tuning ')} than on rank 0; make them equal (on ")
    assert messages[0].endswith(", rank 1)")
