"""What torch.compile makes of a run: one graph to train, one to validate, and DDP's cuts where its buckets end."""
import re

from tests.common import read_metrics

FLAGS = ("--n_head", 2, "--n_embd", 192, "--block_size", 16, "--device", "cpu", "--dtype", "fp32", "--total_batch_size",
         128, "--micro_batch_size", 2, "--max_steps", 3, "--eval_every", 2, "--val_tokens", 96, "--sample_every", 0,
         "--hellaswag_every", 0, "--checkpoint_every", 0)


def counted(run_ranks, n, *flags, **env):
    """(graphs compiled, breaks, graphs captured), the same on every rank of a run of train.py in n processes."""
    codes, out = run_ranks(n, "tests/graphs.py", *FLAGS, *flags, env=env)
    assert codes == [0] * n, out
    found = set(re.findall(r"^(\d+) graphs, (\d+) breaks, (\d+) captured", out, re.M))
    assert len(found) == 1, out
    return tuple(map(int, found.pop()))


def test_start_up_training_and_validation_share_two_graphs(run_ranks, make_shards, tmp_path):
    """Train, validate, train: none is compiled again for rows laid out otherwise."""
    flags = ("--n_layer", 1, "--data_dir", make_shards([900], [100]), "--log_dir", tmp_path / "logs")
    assert counted(run_ranks, 1, *flags) == (2, 0, 2)


def test_start_up_leaves_ddp_the_graph_cut_where_its_buckets_end(run_ranks, make_shards, tmp_path):
    """Only a graph that DDP's first forward pass compiled is cut; one piece would reduce nothing until its end.

    A layer has 1.8 MB, so each fills a bucket of 1 MB.
    """
    flags = ("--n_layer", 4, "--data_dir", make_shards([900], [100]), "--log_dir", tmp_path / "logs")
    compiled, breaks, captured = counted(run_ranks, 2, *flags)
    assert (breaks, captured) == (0, 2) and compiled >= 1 + 4       # the validation's, and the pieces


def test_where_one_rank_cannot_compile_none_does(run_ranks, make_shards, tmp_path):
    flags = ("--n_layer", 1, "--data_dir", make_shards([900], [100]), "--log_dir", tmp_path / "logs")
    codes, out = run_ranks(2, "tests/graphs.py", *FLAGS, *flags, env=dict(COMPILATION="differs"))
    assert codes == [0, 0] and "torch.compile is off: it does not work on another rank" in out, out
    assert out.count("0 graphs, 0 breaks") == 2


def test_a_model_that_cannot_be_compiled_trains_without_in_a_ddp_of_its_own(run_ranks, make_shards, tmp_path):
    """As one that was started with --compile off, after a DDP of the compiled model."""
    flags = ("--n_layer", 1, "--data_dir", make_shards([900], [100]), "--log_dir")
    compiled, breaks, captured = counted(run_ranks, 2, *flags, tmp_path / "fails", COMPILATION="fails")
    assert (breaks, captured) == (0, 1) and compiled > 1             # the try
    codes, out = run_ranks(2, "train.py", *FLAGS, *flags, tmp_path / "off", "--compile", "off")
    assert codes == [0, 0], out
    losses = [[row.get("loss") for row in read_metrics(tmp_path / name)] for name in ("fails", "off")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
