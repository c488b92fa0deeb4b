"""Test shards.py and write_shards: NumPy can read the shards, and damaged folders are refused by name."""
import hashlib
import itertools
import json
import shutil
import struct

import numpy as np
import pytest

from exactgpt.config import UserError
from exactgpt.shard_writer import save_shard, write_shards
from exactgpt.shards import Manifest, ShardFolder, load_manifest, open_shard, permutation
from exactgpt.tokenizer import train_tokenizer
from tests.common import permuted


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    """Write a shard as llm.c's data_common.py and modded-nanogpt do."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())


def read_all(shard):
    out = np.empty(shard.n_tokens, dtype="<u2")
    with shard.open() as file:
        shard.read_tokens(file, 0, out)
    return out


def rewrite(folder, **changes):
    stored = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**stored, **changes}))


# --- the format


@pytest.mark.parametrize("n", [1, 2, 1000, 70_000])
def test_shards_are_npy_files(tmp_path, n):
    tokens = np.random.default_rng(n).integers(0, 50257, n).astype(np.uint16)
    entry = save_shard(tmp_path, "x", "train", 1, tokens)
    path = tmp_path / "x_train_000001.npy"
    np.save(tmp_path / "reference.npy", tokens)
    assert path.read_bytes() == (tmp_path / "reference.npy").read_bytes()
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), tokens)
    assert entry == dict(file=path.name, split="train", tokens=n,
                         sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    np.testing.assert_array_equal(read_all(open_shard(path)), tokens)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reference.npy", path.name]


def test_build_nanogpt_folders_are_read(tmp_path):
    names = [f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(4)]
    tokens = {name: np.arange(100 * i, 100 * i + 100 - i, dtype=np.uint16) for i, name in enumerate(names)}
    for name, values in tokens.items():
        np.save(tmp_path / name, values)
    (tmp_path / "notes.txt").write_text("not a shard")
    folder = ShardFolder(tmp_path)
    assert folder.manifest is None and folder.tokenizer().name == "gpt2"
    assert [s.path.name for s in folder.val + folder.train] == list(tokens)
    for shard in folder.shards:
        np.testing.assert_array_equal(read_all(shard), tokens[shard.path.name])
    folder.verify(50257)


@pytest.mark.parametrize("names", [("edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin"),
                                   ("tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin"),
                                   ("x_val_000000.bin", "x_train_000000.bin")])
def test_bin_folders_of_llmc_and_modded_nanogpt_are_read(tmp_path, names):
    for i, name in enumerate(names):
        write_bin(tmp_path / name, np.arange(50) + 100 * i)
    folder = ShardFolder(tmp_path)
    assert [s.path.name for s in folder.val + folder.train] == list(names)
    np.testing.assert_array_equal(read_all(folder.train[0]), np.arange(100, 150))
    out = np.empty(7, dtype="<u2")
    with folder.val[0].open() as file:
        folder.val[0].read_tokens(file, 43, out)
    np.testing.assert_array_equal(out, np.arange(43, 50))


def test_train_shards_are_in_numerical_order(tmp_path):
    for i in range(1, 13):
        write_bin(tmp_path / f"x_train_{i}.bin", [i])
    assert [read_all(s)[0] for s in ShardFolder(tmp_path).train] == list(range(1, 13))


def test_fingerprint_depends_on_the_shards_not_the_path(make_shards):
    one, two = ShardFolder(make_shards([50, 60], name="one")), ShardFolder(make_shards([50, 60], name="two"))
    def entries(folder):
        return folder.fingerprint(folder.check_vocabulary(2**16))
    assert entries(one) == entries(two)
    assert entries(one)["data"] != entries(ShardFolder(make_shards([50, 61], name="three")))["data"]
    other = ShardFolder(make_shards([50, 60], name="four", seed=1))      # other tokens in files of the same sizes
    assert [entries(other)[name] == value for name, value in entries(one).items()] == [True, False, False]
    (one.folder / "manifest.json").unlink()
    assert entries(ShardFolder(one.folder)) == {k: v for k, v in entries(two).items() if k != "data_sha256"}


def test_permutation_never_changes():
    assert permutation(8, 1337, "documents").tolist() == [6, 0, 1, 3, 7, 2, 5, 4]
    assert permutation(1000, 1337, "documents").tolist() == permuted(range(1000), 1337, "documents")
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(n, "a", n).tolist()) == list(range(n))
    assert permutation(100, 1).tolist() != permutation(100, 2).tolist()


# --- damaged and unsuitable folders


def damage_truncated(folder):
    path = folder / "test_train_000001.npy"
    path.write_bytes(path.read_bytes()[:-1])


def damage_longer(folder):
    path = folder / "test_train_000001.npy"
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_emptied(folder):
    (folder / "test_train_000001.npy").write_bytes(b"")


def damage_without_tokens(folder):
    np.save(folder / "test_train_000001.npy", np.empty(0, dtype=np.uint16))


def damage_wrong_type(folder):
    np.save(folder / "test_train_000001.npy", np.arange(500, dtype=np.int64))


def damage_wrong_shape(folder):
    np.save(folder / "test_train_000001.npy", np.zeros((5, 100), dtype=np.uint16))


def damage_pickled(folder):
    np.save(folder / "test_train_000001.npy", np.array([{}], dtype=object), allow_pickle=True)


def damage_other_count(folder):
    np.save(folder / "test_train_000001.npy", np.zeros(499, dtype=np.uint16))


def damage_missing(folder):
    (folder / "test_train_000001.npy").unlink()


def damage_extra_shard(folder):
    np.save(folder / "test_train_000003.npy", np.zeros(10, dtype=np.uint16))


@pytest.mark.parametrize("damage", [
    damage_truncated, damage_longer, damage_emptied, damage_without_tokens, damage_wrong_type, damage_wrong_shape,
    damage_pickled, damage_other_count, damage_missing, damage_extra_shard])
def test_damaged_shards_are_refused_by_name(make_shards, damage):
    folder = make_shards([500, 500])
    ShardFolder(folder)
    damage(folder)
    with pytest.raises(UserError, match=r"shard .*test_train_00000[13]\.npy"):
        ShardFolder(folder)


def test_random_bytes_in_a_header_are_refused(tmp_path):
    """Random bytes in the header raise a UserError, never another exception of NumPy's parser."""
    path = tmp_path / "x_train_000001.npy"
    np.save(path, np.arange(10, dtype=np.uint16))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(0, 128, rng.integers(1, 20)):
            bad[place] = rng.integers(0, 256)
        path.write_bytes(bytes(bad))
        try:
            assert open_shard(path).n_tokens == 10      # the change was harmless, in the padding
        except UserError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("options, message", [
    (dict(magic=20240801), "magic 20240801"), (dict(version=2), "version 2"), (dict(count=99), "promises 99 tokens"),
    (dict(count=-1), "promises -1 tokens"), (dict(count=2**31 - 1), "promises 2,147,483,647 tokens")])
def test_foreign_bin_files_are_refused(tmp_path, options, message):
    write_bin(tmp_path / "x_train_000001.bin", range(100), **options)
    with pytest.raises(UserError, match=f"x_train_000001.bin.*{message}"):
        ShardFolder(tmp_path)


def test_a_short_bin_file_is_refused(tmp_path):
    (tmp_path / "x_train_000001.bin").write_bytes(struct.pack("<3i", 20240520, 1, 0))
    with pytest.raises(UserError, match=r"x_train_000001\.bin"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize("names, message", [
    ([], "no shards in"), (["x_train_000001.npy", "x_train_000003.npy"], "shard 000003 follows 000001"),
    (["x_val_000000.npy", "x_train_000002.npy"], "shard 000002 follows 000000"),
    (["x_train_000001.npy", "y_train_000002.npy"], "mixes the data sets 'x' and 'y'"),
    (["x_train_000001.npy", "x_train_000002.bin"], "mixes .npy and .bin"),
    (["x_train_000001.npy", "x_train_1.npy"], "shard 000001 follows 000001")])
def test_gaps_duplicates_and_mixtures_are_refused(tmp_path, names, message):
    for name in names:
        np.save(open(tmp_path / name, "wb"), np.arange(10, dtype=np.uint16))
    with pytest.raises(UserError, match=message):
        ShardFolder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none; make them with prepare_fineweb\.py"):
        ShardFolder(tmp_path / "none")


def test_an_incomplete_folder_is_refused_unless_allowed(make_shards):
    folder = make_shards([100])
    rewrite(folder, complete=False)
    with pytest.raises(UserError, match="incomplete; run the same prepare command again"):
        ShardFolder(folder)
    np.save(folder / "test_train_000002.npy", np.zeros(3, dtype=np.uint16))     # not yet in the manifest
    assert len(ShardFolder(folder, need_complete=False).train) == 1


@pytest.mark.parametrize("changes, message", [
    (dict(format=2), "format 2"), (dict(vocab_size="257"), "vocab_size"), (dict(shards=[3]), "shards"),
    (dict(surprise=1), "surprise"),
    (dict(shards=[dict(file="x_train_000001.npy", split="train", tokens=True, sha256="")]), "shards"),
    (dict(complete=1), "complete"), (dict(position=[]), "position")])
def test_damaged_manifests_are_refused(make_shards, changes, message):
    folder = make_shards([100])
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=f"manifest.json.*{message}"):
        load_manifest(folder)


@pytest.mark.parametrize("file", ["../x_train_000001.npy", "/etc/passwd", "/etc/x_train_000001.npy"])
def test_a_manifest_cannot_name_files_elsewhere(make_shards, file):
    folder = make_shards([100])
    rewrite(folder, shards=[dict(file=file, split="train", tokens=1, sha256="")])
    with pytest.raises(UserError, match=f"shard {file} is missing"):
        ShardFolder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_manifests_that_are_no_json_object_are_refused(make_shards, content):
    folder = make_shards([100])
    (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_manifest(folder)


def test_a_tokenizer_that_does_not_match_the_manifest_is_refused(make_shards, tmp_path):
    folder = make_shards([100])
    train_tokenizer(["some other text, some other vocabulary"], 300).save(folder)
    with pytest.raises(UserError, match="made with the vocabulary"):
        ShardFolder(folder).tokenizer()
    (folder / "vocab.bpe").rename(tmp_path / "vocab.bpe")
    for fallback in ("", tmp_path):
        with pytest.raises(UserError, match="made with the vocabulary"):
            ShardFolder(folder).tokenizer(fallback)


def test_the_fallback_folder_is_used_without_a_vocabulary_and_must_agree_with_one(make_shards, tmp_path):
    folder, n_vocab = make_shards([100]), 257
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "vocab.bpe", tmp_path / "same")
    train_tokenizer(["some other text, some other vocabulary"], 300).save(tmp_path / "other")
    with pytest.raises(UserError, match="but --tokenizer"):
        ShardFolder(folder).tokenizer(tmp_path / "other")
    assert ShardFolder(folder).tokenizer(tmp_path / "same").n_vocab == n_vocab
    (folder / "vocab.bpe").unlink()
    assert ShardFolder(folder).tokenizer(tmp_path / "same").n_vocab == n_vocab


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_tokens_outside_the_vocabulary(make_shards, place):
    tokens = np.zeros(100_064, dtype=np.uint16)
    tokens[64 + place] = 300
    folder = ShardFolder(make_shards([100_000], tokens=tokens))
    for n_vocab in (257, 300):
        with pytest.raises(UserError, match=rf"_000001\.npy contains token 300, outside the vocabulary of {n_vocab}"):
            folder.verify(n_vocab)
        if place != 50_000:         # the sample includes both ends
            with pytest.raises(UserError, match="contains token 300"):
                folder.check_vocabulary(n_vocab)
    folder.verify(301)
    folder.check_vocabulary(301)


def test_verify_finds_a_changed_byte(make_shards):
    folder = make_shards([3000, 5000])
    seen = []
    ShardFolder(folder).verify(257, seen.append)
    assert sum(seen) == 2 * (64 + 3000 + 5000)
    path = folder / "test_train_000002.npy"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"test_train_000002\.npy differs from its hash"):
        ShardFolder(folder).verify(257)


def test_a_shard_that_is_truncated_while_it_is_read(make_shards):
    shard = ShardFolder(make_shards([1000])).train[0]
    with shard.open() as file:
        shard.path.write_bytes(shard.path.read_bytes()[:1000])
        with pytest.raises(UserError, match=r"test_train_000001\.npy became shorter"):
            shard.read_tokens(file, 0, np.empty(1000, dtype="<u2"))


# --- the writer


def cut(tokens, val_tokens, shard_tokens):
    """Cut tokens as build-nanogpt's fineweb.py does, with another size for the first shard."""
    borders = [0, *range(val_tokens, len(tokens), shard_tokens), len(tokens)]
    return [tokens[a:b] for a, b in itertools.pairwise(borders) if b > a]


@pytest.mark.parametrize("val_tokens, shard_tokens, n_documents",
                         [(10, 10, 15), (7, 100, 40), (1, 1, 2), (64, 1000, 9)])
def test_writer_cuts_at_the_borders_and_records_positions(tmp_path, val_tokens, shard_tokens, n_documents):
    rng = np.random.default_rng(val_tokens)
    lengths = rng.integers(1, 40, n_documents)
    documents = [np.array([256, *rng.integers(0, 256, n - 1)], dtype="<u2") for n in lengths]
    manifest = Manifest("test", "bytes", 257, 256)
    stream = np.concatenate(documents)
    begins = np.cumsum([0] + [len(d) for d in documents])

    def pieces():
        for i, document in enumerate(documents):
            n_before = len(manifest.shards)
            yield {"row": i}, document
            if len(manifest.shards) > n_before:     # the manifest on disk says where the next shard begins
                stored = load_manifest(tmp_path)
                written = sum(entry["tokens"] for entry in stored.shards)
                assert begins[stored.position["row"]] + stored.position["skip"] == written
                assert stored.rows == np.count_nonzero(stream[:written] == 256) and not stored.complete
    write_shards(tmp_path, "x", manifest, pieces(), val_tokens, shard_tokens)
    names = sorted(p.name for p in tmp_path.glob("*.npy"))
    expected = cut(stream, val_tokens, shard_tokens)
    assert names == sorted(f"x_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(expected)))
    for i, tokens in enumerate(expected):
        np.testing.assert_array_equal(np.load(tmp_path / f"x_{'train' if i else 'val'}_{i:06d}.npy"), tokens)
    stored = load_manifest(tmp_path)
    assert stored.complete and stored.rows == n_documents
    ShardFolder(tmp_path).verify(257)


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("exactgpt.config.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some"):
        save_shard(tmp_path, "x", "val", 0, np.zeros(10))
    assert list(tmp_path.iterdir()) == []
