"""Test prepare_fineweb.py: the same bytes for any number of workers and after any kill."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import prepare_fineweb
from exactgpt import shard_writer
from exactgpt.config import UserError
from exactgpt.documents import read_texts
from exactgpt.shard_writer import encode_in_order
from exactgpt.shards import Manifest, ShardFolder, load_manifest
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer
from prepare_fineweb import PrepareFinewebConfig, main
from tests.common import ROOT, SHARED_DATA, script_env
from tests.corpora import (
    build_nanogpt_shards,
    kill_when,
    load_shards,
    parquet_bytes,
    random_texts,
    read_files,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder of three parquet files, and their texts in order."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


def prepare(out, *flags):
    main(["--out", str(out), *map(str, flags)])


# --- the tokens


@pytest.mark.parametrize("shard_tokens", [1000, 7777, 40_000])
def test_tokens_match_build_nanogpt(corpus, tmp_path, shard_tokens):
    folder, texts = corpus
    prepare(tmp_path / "out", "--data_files", f"{folder}/*.parquet", "--shard_tokens", shard_tokens, "--num_proc", 0)
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(texts, shard_tokens)
    manifest = ShardFolder(tmp_path / "out").manifest
    assert manifest.complete and manifest.rows == len(texts)
    assert not [name for name in read_files(tmp_path / "out") if name.endswith(".tmp")]


def test_max_tokens_limits_the_output_and_the_validation_shard(corpus, tmp_path):
    folder, texts = corpus
    prepare(tmp_path / "out", "--data_files", f"{folder}/*.parquet", "--max_tokens", 12_345, "--num_proc", 0)
    ours, theirs = load_shards(tmp_path / "out"), build_nanogpt_shards(texts, 10**9, 1234)
    assert [len(v) for v in ours.values()] == [12_345 - 1234, 1234]
    for name, tokens in ours.items():
        assert tokens == theirs[name][:len(tokens)]


def test_real_fineweb_sample_from_parquet_and_jsonl(tmp_path):
    path = SHARED_DATA / "fineweb_edu_sample.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    texts = [json.loads(line)["text"] for line in path.open()]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(texts))
    for name, files in (("parquet", tmp_path / "a.parquet"), ("jsonl", path)):
        prepare(tmp_path / name, "--data_files", files, "--shard_tokens", 50_000, "--num_proc", 0)
        assert load_shards(tmp_path / name) == build_nanogpt_shards(texts, 50_000)


@pytest.mark.slow
def test_tokenizer_flag_uses_the_vocabulary_in_that_folder(corpus, tmp_path):
    own = Tokenizer([("a", "b")], "")
    own.save(tmp_path)
    flags = ["--data_files", f"{corpus[0]}/*.parquet", "--max_tokens", 3000, "--num_proc", 0]
    prepare(tmp_path / "out", *flags, "--tokenizer", tmp_path)
    tokens = [token for shard in load_shards(tmp_path / "out").values() for token in shard]
    assert ShardFolder(tmp_path / "out").tokenizer().merges == own.merges
    assert len(tokens) == 3000 and max(tokens) == own.eot
    prepare(tmp_path / "out", "--verify", "--tokenizer", tmp_path)
    with pytest.raises(UserError, match="differing: tokenizer"):
        prepare(tmp_path / "out", *flags)


@pytest.mark.parametrize("num_proc", [1, 2, 5])
def test_any_number_of_threads_writes_the_same_bytes(corpus, tmp_path, num_proc):
    flags = ["--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", 3000]
    prepare(tmp_path / "0", *flags, "--num_proc", 0)
    prepare(tmp_path / "n", *flags, "--num_proc", num_proc)
    assert read_files(tmp_path / "0") == read_files(tmp_path / "n")


def test_pending_batches_are_bounded_with_a_slow_consumer(monkeypatch):
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 1)
    planned = []

    def documents():
        for i in range(100):
            planned.append(i)
            yield i, "text", True
    results = encode_in_order(documents(), gpt2_tokenizer(), 2)
    for i, _ in enumerate(results):
        assert len(planned) <= i + 1 + 3 * 2
        if i == 30:
            results.close()
    assert len(planned) < 40


def test_they_import_nothing_large(run):
    code = ("import prepare_fineweb, prepare_text, sys\n"
            "print({'torch', 'datasets', 'pyarrow', 'huggingface_hub', 'tokenizers'} & set(sys.modules))")
    assert run("-c", code)[1] == "set()\n"


# --- reading from the middle


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_parquet_files_are_read_from_any_row(tmp_path, row_group_size):
    texts = [*random_texts(40, 3), None, ""]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(texts, row_group_size))
    for start in (0, 1, 6, 7, 8, 41, 42):
        expected = [(row, texts[row] or "") for row in range(start, 42)]
        assert list(read_texts(path, "text", start)) == expected


def test_jsonl_files_are_read_from_any_line(tmp_path):
    texts = random_texts(30, 4)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"text": t}) for t in texts).encode() + b"\n\n")
    rows = list(read_texts(path, "text"))
    assert [text for _, text in rows] == texts
    for i, (start, _) in enumerate(rows):
        assert list(read_texts(path, "text", start)) == rows[i:]


# --- kills and restarts


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [0, 2])
def test_a_killed_run_continues_to_the_same_bytes(corpus, tmp_path, num_proc):
    flags = ["--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", "2500", "--num_proc", str(num_proc)]
    prepare(tmp_path / "not_killed", *flags)
    out, kills = tmp_path / "killed", 0
    command = [sys.executable, str(ROOT / "prepare_fineweb.py"), *flags, "--out", str(out)]
    for n_shards in (0, 2, 7, 8):
        reached = lambda n=n_shards: out.exists() and len(list(out.glob("*.npy"))) >= n
        kills += kill_when(command, script_env(tmp_path), reached)
        shards = load_manifest(out).shards if (out / "manifest.json").exists() else []
        on_disk = load_shards(out)
        assert [len(on_disk[entry["file"]]) for entry in shards] == [2500] * len(shards)    # no partial shard
    assert kills >= 3
    notes = out / "downloads" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "part.incomplete").touch()         # of a download that was killed
    prepare(out, *flags, "--keep_downloads")
    assert not list(notes.iterdir())
    shutil.rmtree(out / "downloads")
    assert read_files(out) == read_files(tmp_path / "not_killed")


def test_a_run_interrupted_again_and_again_in_a_batch_continues_to_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(random_texts(20, 1)))
    Tokenizer([], "bytes").save(tmp_path)
    flags = ["--data_files", tmp_path / "a.parquet", "--shard_tokens", 2500, "--num_proc", 0, "--tokenizer", tmp_path]
    prepare(tmp_path / "whole", *flags)
    save, saved = shard_writer.save_shard, []

    def save_one(*arguments):
        if saved:
            raise KeyboardInterrupt
        saved.append(arguments)
        return save(*arguments)
    monkeypatch.setattr(shard_writer, "save_shard", save_one)
    for n_shards in (1, 2, 3):
        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", *flags)
        assert len(load_manifest(tmp_path / "out").shards) == n_shards
    monkeypatch.undo()
    prepare(tmp_path / "out", *flags)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_a_source_that_ends_with_its_validation_shard_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Once upon a time"}) + "\n")
    n = 1 + len(gpt2_tokenizer().encode("Once upon a time"))
    for shard_tokens in (n, n + 1):
        with pytest.raises(UserError, match=f"the source ends after {n} tokens, inside the validation shard of"):
            prepare(tmp_path / f"{shard_tokens}", "--data_files", tmp_path / "a.jsonl", "--shard_tokens", shard_tokens)
    prepare(tmp_path / "out", "--data_files", tmp_path / "a.jsonl", "--shard_tokens", n - 1)
    assert [len(tokens) for tokens in load_shards(tmp_path / "out").values()] == [1, n - 1]


@pytest.mark.parametrize("delay", [0.4, 1.0, None])
def test_ctrl_c_stops_it_without_a_traceback(corpus, tmp_path, delay):
    out = tmp_path / "out"
    flags = ["--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", "1000", "--num_proc", "2", "--out", str(out)]
    command = [sys.executable, str(ROOT / "prepare_fineweb.py"), *flags]
    process = subprocess.Popen(command, env=script_env(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)
    if delay is None:
        while process.poll() is None and not list(out.glob("*.npy")):
            time.sleep(0.002)
    else:
        time.sleep(delay)       # during startup, or soon after
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1].decode()
    # Before main() starts, Python itself prints a traceback.
    assert process.returncode in (130, -signal.SIGINT, 0)
    assert "Traceback" not in error or not out.exists()
    assert not list(out.glob("*.tmp"))


def test_only_one_run_uses_a_folder(corpus, tmp_path):
    from exactgpt.files import FolderLock
    with FolderLock(tmp_path / "out", 0), pytest.raises(UserError, match="another run is using"):
        prepare(tmp_path / "out", "--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", 1000, "--num_proc", 0)


def test_changed_settings_are_refused_by_name(corpus, tmp_path):
    flags = ["--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", 1000, "--num_proc", 0]
    prepare(tmp_path / "out", *flags)
    before = read_files(tmp_path / "out")
    for more, named in ((["--shard_tokens", 2000], "shard_tokens"), (["--max_tokens", 5000], "max_tokens"),
                        (["--dataset", "a/b", "--name", "c"], "dataset, name"),
                        (["--text_column", "id"], "text_column")):
        with pytest.raises(UserError, match=rf"differing: {named}\)"):
            prepare(tmp_path / "out", *flags, *more)
    assert read_files(tmp_path / "out") == before


def test_local_files_that_changed_are_refused(corpus, tmp_path):
    shutil.copytree(corpus[0], tmp_path / "files")
    flags = ["--data_files", f"{tmp_path}/files/*.parquet", "--shard_tokens", 1000, "--num_proc", 0]
    prepare(tmp_path / "out", *flags)
    manifest = load_manifest(tmp_path / "out")
    manifest.complete = False
    manifest.save(tmp_path / "out")
    (tmp_path / "files" / "003.parquet").write_bytes(parquet_bytes(["more"]))
    with pytest.raises(UserError, match=r"the files of --data_files .* changed"):
        prepare(tmp_path / "out", *flags)


def test_verify(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(out, "--data_files", f"{corpus[0]}/*.parquet", "--shard_tokens", 3000, "--num_proc", 0)
    prepare(out, "--verify")
    assert "hashes, sizes and token ids are correct" in capsys.readouterr().out
    path = out / "edufineweb_train_000002.npy"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"edufineweb_train_000002\.npy differs from its hash"):
        prepare(out, "--verify")


# --- other behavior


@pytest.mark.parametrize("max_tokens, n_ahead", [(None, 1), (10**9, 0)])
def test_at_most_one_file_is_prefetched(corpus, monkeypatch, max_tokens, n_ahead):
    fetched = []
    monkeypatch.setattr(prepare_fineweb, "download_source_file",
                        lambda _dataset, _commit, file, _folder: fetched.append(file) or corpus[0] / file)
    manifest = Manifest("", "", 0, 0, files=["000.parquet", "001.parquet", "002.parquet"],
                        position={"file": 0, "start": 98, "skip": 0})
    config = PrepareFinewebConfig(out="", max_tokens=max_tokens)
    for position, text, _ in prepare_fineweb.iter_documents(config, manifest):
        time.sleep(0.001)
        assert manifest.files[:position["file"] + 1] == fetched[:position["file"] + 1]
        assert len(fetched) <= position["file"] + 1 + n_ahead
        assert text == corpus[1][(0, 100, 101)[position["file"]] + position["start"]]
    assert fetched == manifest.files


def test_default_folder_and_shard_names():
    def names(**flags):
        config = PrepareFinewebConfig(**flags).with_defaults()
        return config.out, config.prefix(), config.val_tokens()
    assert names() == ("data/edu_fineweb10B", "edufineweb", 100_000_000)
    assert names(data_files="x/*.parquet", max_tokens=10**7) == ("data/edu_fineweb10B", "edufineweb", 10**6)
    assert names(name="CC-MAIN-2024-10")[0] == "data/edufineweb_CC-MAIN-2024-10"
    assert names(dataset="Skylion007/openwebtext")[:2] == ("data/openwebtext", "openwebtext")


@pytest.mark.parametrize("flags, message", [
    (["--data_files", "nothing/*.parquet"], "--data_files nothing/*.parquet: no file matches"),
    (["--data_files", "*.txt"], "cannot read a.txt: it must end in one of .parquet, .jsonl"),
    (["--data_files", "fake.parquet"], "fake.parquet is not a readable parquet file"),
    (["--data_files", "bad.jsonl"], "bad.jsonl, byte 14: not valid JSON"),
    (["--max_tokens", "5"], "--max_tokens must be >= 20"),
    (["--num_proc", "-1"], "--num_proc must be >= 0"),
    (["--verify", "--out", "none"], "no shards: there is no folder none"),
    (["--max_token", "100"], "unknown argument --max_token; did you mean --max_tokens?"),
])
def test_wrong_commands_print_one_line(tmp_path, run, flags, message):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "fake.parquet").write_text("PAR1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    rc, _, err = run("prepare_fineweb.py", *flags, cwd=tmp_path)
    assert rc == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.npy"))
    assert "jsonl" in message or not (tmp_path / "data").exists()


@pytest.mark.slow
def test_finished_shards_survive_a_damaged_row_group(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 1000)
    shutil.copytree(corpus[0], tmp_path / "files")
    path, flags = tmp_path / "files" / "003.parquet", ["--data_files", f"{tmp_path}/files/*", "--shard_tokens", 1000]
    texts = random_texts(600, 9)
    good = parquet_bytes(texts)
    path.write_bytes(good[:2 * len(good) // 3] + bytes(2000) + good[2 * len(good) // 3 + 2000:])
    with pytest.raises(UserError, match=r"003\.parquet is not a readable parquet file"):
        prepare(tmp_path / "out", *flags, "--num_proc", 2)
    assert len(list((tmp_path / "out").glob("*.npy"))) > 3
    path.write_bytes(good)
    prepare(tmp_path / "out", *flags, "--num_proc", 2)
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(corpus[1] + texts, 1000)
