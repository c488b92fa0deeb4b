"""overlap.py and what hellaswag.py does with it: runs of 13 tokens, found wherever they lie; the scores of a part."""
import json
import math

import numpy as np
import pytest

from exactgpt import overlap
from exactgpt.files import as_json
from exactgpt.overlap import find_overlaps, hash_runs
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import gpt2_tokenizer
from hellaswag import load_hellaswag, main, measure_overlap, parse_example, result_of
from tests.common import HELLASWAG_EXAMPLE, HELLASWAG_FILE, refusal, write_nanogpt_data

SIZES = [1, 3, 40, 13, 2, 100, 7, 12, 60]      # of the train shards: a run may lie in four of them


def reference(texts, stream):
    """Which texts share 13 tokens with a stream, by sets of tuples."""
    def runs(tokens):
        return {tuple(tokens[i:i + 13]) for i in range(len(tokens) - 12)}
    return [bool(runs(text) & runs(stream)) for text in texts]


def equal_hashes(tokens):
    return np.zeros(len(tokens) - 12, dtype=np.uint64)


@pytest.mark.parametrize("chunk", [9, 64, overlap.CHUNK])
def test_a_run_of_13_tokens_is_found_wherever_it_lies_and_one_of_12_nowhere(make_shards, monkeypatch, chunk):
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    val, stream = np.split(np.random.default_rng(0).integers(0, 257, 64 + sum(SIZES)).tolist(), [64])
    folder = ShardFolder(make_shards(SIZES, [64], tokens=[*val, *stream]))
    pieces = [(n, stream[i:i + n].tolist()) for n in (12, 13, 14) for i in range(len(stream) - n + 1)]
    texts = [[300] * (i % 3) + piece + [301] * (i % 5) for i, (_, piece) in enumerate(pieces)]
    expected = [n >= 13 for n, _ in pieces]
    assert expected == reference(texts, stream)
    texts += [stream[20:26], stream[26:33], [], val, stream[50:63], stream[50:63]]    # a run in two texts is none
    expected += [False, False, False, False, True, True]
    assert find_overlaps(texts, folder).tolist() == expected
    assert not find_overlaps([[], stream[:12]], folder).any() and len(find_overlaps([], folder)) == 0


@pytest.mark.parametrize("hash_of", [hash_runs, equal_hashes])
def test_runs_that_occur_again_and_again_and_equal_hashes_change_nothing(make_shards, monkeypatch, hash_of):
    monkeypatch.setattr(overlap, "hash_runs", hash_of)
    rng = np.random.default_rng(1)
    stream = rng.integers(0, 2, sum(SIZES))
    stream[30:90] = 1
    texts = [rng.integers(0, 2, n).tolist() for n in rng.integers(8, 40, 60)] + [[1] * 20, [1] * 13, [1] * 12]
    expected = reference(texts, stream)
    assert 10 < sum(expected) < 50
    assert find_overlaps(texts, ShardFolder(make_shards(SIZES, [], tokens=stream))).tolist() == expected


def test_the_hash_is_the_polynomial_of_all_13_tokens():
    tokens = np.random.default_rng(2).integers(0, 65536, 40).astype("<u2")
    expected = [sum(int(token) * overlap.BASE ** (12 - k) for k, token in enumerate(tokens[i:i + 13])) % 2**64
                for i in range(28)]
    assert hash_runs(tokens).tolist() == expected


# -----------------------------------------------------------------------------
# hellaswag.py

@pytest.mark.parametrize("source_id, source", [
    ("activitynet~v_-IMXSEIabMM", "activitynet"), ("wikihow~1", "wikihow"), ("wikihow", ""), ("reddit~wikihow~1", ""),
    ("", ""), (None, ""), (7, ""), (["wikihow~1"], "")])
def test_an_example_belongs_to_the_part_that_its_source_id_names(source_id, source):
    assert parse_example({**HELLASWAG_EXAMPLE, "source_id": source_id}, "karpathy", "").source == source
    assert parse_example(HELLASWAG_EXAMPLE, "lm_eval", "").source == ""


@pytest.fixture
def items():
    """20 items in two parts and one that belongs to neither and has a short context."""
    rows = [json.loads(line) for line in HELLASWAG_FILE.read_text(encoding="utf-8").splitlines()]
    return [*({**row, "source_id": f"{'wikihow' if i % 3 else 'activitynet'}~{i}"} for i, row in enumerate(rows)),
            {**HELLASWAG_EXAMPLE, "source_id": 7}]


@pytest.fixture
def shards(items, make_shards):
    """A folder in GPT-2's vocabulary with the contexts 2 and 7 in its train shards, and 5 in its val shard."""
    val, *train = ([50256, *gpt2_tokenizer().encode(items[i]["ctx"])] for i in (5, 2, 7))
    return make_shards([sum(map(len, train))], [len(val)], vocab=50257, tokens=sum(train, val))


@pytest.fixture
def score(byte_model, tmp_path):
    """Return score(items, *flags) -> what hellaswag.py --json writes."""
    def run_main(items, *flags):
        data, out = tmp_path / "items.jsonl", tmp_path / "out.json"
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        out.unlink(missing_ok=True)
        main(["--checkpoint", str(byte_model[0]), "--data", str(data), "--json", str(out), "--device", "cpu", "--dtype",
              "fp32", *map(str, flags)])
        return json.loads(out.read_text())
    return run_main


SCORES = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "n")


def test_parts_and_what_does_not_overlap_score_as_they_do_alone(score, items, shards, capsys):
    """The shards have another vocabulary than the model."""
    result, printed = score(items, "--overlap", shards), capsys.readouterr().out
    short = sum(len(gpt2_tokenizer().encode(item["ctx"])) < 13 for item in items)
    assert short and {k: v for k, v in result["overlap"].items() if k not in SCORES} == dict(
        shards=str(shards), run=13, items=2, too_short=short)
    assert f"2 of 21 contexts have 13 tokens in a row in common with {shards}; {short} are too short" in printed
    assert result["parts"].keys() == {"activitynet", "wikihow"} and result["n"] == 21
    for name, part, chosen in (
            ("ActivityNet", result["parts"]["activitynet"], items[:20:3]),
            ("WikiHow", result["parts"]["wikihow"], [item for i, item in enumerate(items[:20]) if i % 3]),
            ("no overlap", result["overlap"], [item for i, item in enumerate(items) if i not in (2, 7)])):
        alone = score(chosen)
        assert [part[key] for key in SCORES] == [alone[key] for key in SCORES] and alone["n"] == len(chosen)
        assert (f"  {name:<11}  {alone['acc']:.4f} ± {alone['acc_stderr']:.4f}  {alone['acc_norm']:.4f} ± "
                f"{alone['acc_norm_stderr']:.4f}  {len(chosen)} examples\n") in printed
    assert len({(part["acc"], part["acc_norm"]) for part in (result, *result["parts"].values())}) == 3
    assert "overlap" not in alone


def test_where_every_context_overlaps_there_is_no_accuracy_without():
    examples = load_hellaswag(HELLASWAG_FILE, limit=3)
    right = [np.array([True, False, True]), np.array([True, False, False])]
    result = result_of(right, examples, (np.array([True, True, True]), dict(items=3)))
    assert result["acc"] == 2 / 3 and result["acc_stderr"] == pytest.approx(math.sqrt(1 / 9))
    assert as_json(result["overlap"]) == dict(items=3, n=0, **dict.fromkeys(SCORES[:4])) and result["parts"] == {}


def test_a_folder_without_train_shards_or_with_characters_is_refused(make_shards, tmp_path):
    assert "has no train shards; name the folder that" in refusal(measure_overlap, [], str(make_shards([], [64])))
    write_nanogpt_data(tmp_path / "characters", "ROMEO: wherefore art thou" * 9)
    assert "are characters; name a folder with" in refusal(measure_overlap, [], str(tmp_path / "characters"))
