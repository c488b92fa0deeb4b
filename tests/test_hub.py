"""Test hub.py and prepare_fineweb.py against a local server that imitates the hub and its failures."""
import hashlib
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from exactgpt import hub
from exactgpt.config import UserError
from exactgpt.shards import load_manifest
from tests.common import ROOT, script_env
from tests.corpora import build_nanogpt_shards, kill_when, load_shards, parquet_bytes, write_corpus
from tests.fake_hub import COMMIT, CONVERTED, serve

EDU = "HuggingFaceFW/fineweb-edu"
FAST_RETRIES = ("import prepare_fineweb; from exactgpt import config, hub; hub.FIRST_PAUSE_S = 0.1; "
             "config.run_script(prepare_fineweb.main)")
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
           {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder of three parquet files, and their texts in order."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


@pytest.fixture
def edu(corpus):
    files = {f"sample/10BT/{p.name}": p.read_bytes() for p in sorted(corpus[0].iterdir())}
    other = {"data/CC-MAIN-2024-10/000.parquet": parquet_bytes(["other"] * 50)}
    return {EDU: {"files": {**files, **other}, "configs": CONFIGS}}


@pytest.fixture
def prepare_from(tmp_path):
    """Return prepare_from(server, *flags) -> (rc, stdout, stderr). Its retry pauses are a tenth as long."""
    def call(server, *flags):
        result = subprocess.run([sys.executable, "-c", FAST_RETRIES, *map(str, flags)], env=hub_env(tmp_path, server),
                                text=True, capture_output=True, timeout=100)
        return result.returncode, result.stdout, result.stderr
    return call


def hub_env(home, server):
    return script_env(home, {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
                             "HF_HUB_ETAG_TIMEOUT": "1", "PYTHONWARNINGS": "ignore"})


def test_files_are_downloaded_and_deleted(corpus, edu, prepare_from, tmp_path):
    with serve(edu) as server:
        rc, out, err = prepare_from(server, "--shard_tokens", 20_000, "--out", tmp_path / "out", "--num_proc", 2)
    assert rc == 0, err
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(corpus[1], 20_000)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.revision == COMMIT
    assert [f["path"] for f in manifest.files] == [f"sample/10BT/00{i}.parquet" for i in range(3)]
    assert {p.suffix for p in (tmp_path / "out").iterdir() if p.name != ".lock"} == {".npy", ".json", ".bpe"}
    assert [p for m, p in server.requests if m == "GET" and "resolve" in p] == [
        f"/datasets/{EDU}/resolve/{COMMIT}/sample/10BT/00{i}.parquet" for i in range(3)]
    assert "at commit 0123456789ab: 3 files" in out and "next: python train.py" in out


def test_keep_downloads(corpus, edu, prepare_from, tmp_path):
    with serve(edu) as server:
        rc, _, err = prepare_from(server, "--shard_tokens", 20_000, "--out", tmp_path, "--num_proc", 0,
                                  "--keep_downloads")
    assert rc == 0, err
    for path in corpus[0].iterdir():
        assert (tmp_path / "downloads/sample/10BT" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_temporary_network_errors_are_retried(corpus, edu, prepare_from, tmp_path):
    faults = [("GET", EDU, 503), ("GET", f"{EDU}/tree", 500), ("GET", "000.parquet", 502),
              ("GET", "001.parquet", "damage"), ("GET", "001.parquet", (500, {"Retry-After": "1"})),
              ("GET", "002.parquet", "cut"), ("GET", "002.parquet", "hang")]
    with serve(edu, faults) as server:
        started = time.monotonic()
        rc, _, err = prepare_from(server, "--shard_tokens", 20_000, "--out", tmp_path / "out", "--num_proc", 0)
        assert server.faults == []
    assert rc == 0, err
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(corpus[1], 20_000)
    assert "HTTP 503; retrying in" in err and "the downloaded file is damaged; retrying in" in err
    assert "HTTP 500; retrying in 1.0 s" in err and time.monotonic() - started > 1      # Retry-After beats 0.1 s
    assert "Traceback" not in err


def test_rate_limits_wait_for_retry_after(edu, prepare_from, tmp_path):
    with serve(edu, [("GET", f"/api/datasets/{EDU}", (429, {"Retry-After": "1.5"}))]) as server:
        rc, _, err = prepare_from(server, "--max_tokens", 2000, "--out", tmp_path / "out", "--num_proc", 0)
    assert rc == 0 and err.count("HTTP 429; retrying in 1.5 s") == 1, err


def test_pauses_double_up_to_a_minute_and_a_server_may_ask_for_ten(monkeypatch):
    pauses, asked, statuses = [], {}, itertools.cycle([408, 425, 429, 500])
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    monkeypatch.setattr(hub.random, "uniform", lambda low, high: (low + high) / 2)

    def refuse():
        error = ConnectionError("busy")
        error.response = SimpleNamespace(status_code=next(statuses), headers=asked)
        raise error
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot get x from the hub \(HTTP 500\)"):
            hub._with_retries(refuse, "x")
        asked["Retry-After"] = "3600"
    assert pauses == [1, 2, 4, 8, 16, 32, 60, *[600] * 7]


@pytest.mark.parametrize("damaged, sha256", [(b"wrong", hashlib.sha256(b"right").hexdigest()),
                                             (b"longer", "")], ids=["hash", "size"])    # a file in git has no hash
def test_a_download_with_another_hash_or_size_is_fetched_again(tmp_path, monkeypatch, damaged, sha256):
    contents = iter([damaged, b"right"])

    def fetch(dataset, path, **options):
        (tmp_path / path).write_bytes(next(contents))
        return str(tmp_path / path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.0)
    file = dict(path="a", size=5, sha256=sha256)
    assert hub.download_source_file("a/b", "main", file, tmp_path).read_bytes() == b"right"


def test_retries_end(edu, prepare_from, tmp_path):
    with serve(edu, [("GET", f"/api/datasets/{EDU}", 503)] * 99) as server:
        rc, _, err = prepare_from(server, "--out", tmp_path / "out")
    assert rc == 2 and "cannot get HuggingFaceFW/fineweb-edu from the hub (HTTP 503); check the network" in err
    assert not (tmp_path / "out").exists()


def test_a_run_killed_during_a_download_continues_at_the_same_commit(corpus, edu, prepare_from, tmp_path):
    flags = ["--shard_tokens", "5000", "--out", str(tmp_path / "out"), "--num_proc", "0"]
    with serve(edu, [("GET", "002.parquet", "hang")]) as server:
        command = [sys.executable, str(ROOT / "prepare_fineweb.py"), *flags]
        requested = lambda: any("002.parquet" in p for m, p in server.requests if m == "GET") \
            and (tmp_path / "out/edufineweb_train_000001.npy").exists()
        assert kill_when(command, hub_env(tmp_path, server), requested)
        server.requests.clear()
        rc, out, err = prepare_from(server, *flags)
        assert rc == 0 and "continuing after shard" in out, err
        assert not [p for _, p in server.requests if p.startswith("/api/datasets")]      # the manifest has the list
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(corpus[1], 5000)
    assert not list((tmp_path / "out").glob("downloads"))


LAYOUTS = {     # files, card, name, expected files
    "a card": (["a/train-0.parquet", "a/test-0.parquet", "b/train-0.parquet"], [
        {"config_name": "a", "data_files": [{"split": s, "path": f"a/{s}-*"} for s in ("train", "test")]},
        {"config_name": "b", "data_files": "b/**"}], "a", ["a/train-0.parquet"]),
    "patterns": (["b/2.parquet", "b/c/1.parquet", "x.parquet"], [
        {"config_name": "a", "data_files": "x.parquet"}, {"config_name": "b", "data_files": ["b/*", "b/c/*.parquet"]}],
        "b", ["b/2.parquet", "b/c/1.parquet"]),
    "one configuration": (["deep/er/0.parquet"], [{"config_name": "only", "data_files": ["deep/**/*.parquet"]}], None,
                          ["deep/er/0.parquet"]),
    "a default": (["a.parquet", "b.parquet"], [
        {"config_name": "a", "data_files": "a.parquet"},
        {"config_name": "b", "data_files": "b.parquet", "default": True}], None, ["b.parquet"]),
    "no card": (["data/train-0.parquet", "data/test-0.parquet"], None, None, ["data/train-0.parquet"]),
    "no split": (["0.parquet", "1.parquet", "validation.parquet"], None, None, ["0.parquet", "1.parquet"]),
    "folders": (["en/train.parquet", "de/train.parquet"], None, "de", ["de/train.parquet"]),
    "jsonl": (["train.jsonl", "train.csv"], None, None, ["train.jsonl"]),
    "outside": (["../../train.parquet", "train.parquet"], None, None, ["train.parquet"]),
}


@pytest.fixture
def use_hub(monkeypatch):
    """Return use_hub(server), which makes this process use that server as the hub."""
    def call(server):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_data_sets(layout, use_hub):
    paths, configs, name, expected = LAYOUTS[layout]
    dataset = {"files": dict.fromkeys(paths, b"data"), **({"configs": configs} if configs else {})}
    with serve({"someone/corpus": dataset}) as server:
        use_hub(server)
        commit, files = hub.resolve_dataset("someone/corpus", name)
    assert commit == COMMIT and [f["path"] for f in files] == expected
    assert all((f["size"], f["sha256"]) == (4, hashlib.sha256(b"data").hexdigest()) for f in files)


def test_other_formats_use_the_hubs_parquet_conversion(use_hub):
    converted = {f"{config}/{split}/0000.parquet": b"" for config in ("default", "b") for split in ("train", "test")}
    with serve({"someone/corpus": {"files": {"train.csv.gz": b""}, "converted": converted}}) as server:
        use_hub(server)
        for name, folder in ((None, "default"), ("b", "b")):
            commit, files = hub.resolve_dataset("someone/corpus", name)
            assert commit == CONVERTED and [f["path"] for f in files] == [f"{folder}/train/0000.parquet"]


HUB_ERRORS = {
    "missing": ("no/such", None, r"the hub refuses no/such \(HTTP 404\); look for it on"),
    "gated": ("some/gated", None, r"refuses some/gated \(HTTP 403\).*accept its terms there and log in"),
    "configuration": (EDU, "sample-1BT", "no configuration 'sample-1BT'; choose one with --name: default, sample-10BT"),
    "configurations": ("some/several", None, "several configurations; choose one with --name: de, en"),
    "formats": ("some/images", None, "some/images has no parquet or jsonl files"),
    "identifier": ("a b", None, "the hub refuses a b"),
    "disabled": ("some/disabled", None, r"the hub refuses some/disabled \(HTTP 403\)"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_permanent_errors_are_not_retried(edu, use_hub, case):
    dataset, name, message = HUB_ERRORS[case]
    several = [{"config_name": n, "data_files": "*"} for n in ("en", "de")]
    others = {"some/gated": {"error": (403, "GatedRepo")}, "some/images": {"files": {"a.png": b"png"}},
              "some/disabled": {"error": (403, "")}, "some/several": {"files": {"a.parquet": b""}, "configs": several}}
    with serve({**edu, **others}) as server:
        use_hub(server)
        started = time.monotonic()
        with pytest.raises(UserError, match=message):
            hub.resolve_dataset(dataset, name)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("garbage", [
    b"<html>Please log in to the hotel's network</html>", b"", b"[]", b"null", b"{}", b'{"siblings": 3}',
    b'{"id": "a", "sha": 5, "siblings": [{}]}', b'{"id": "a", "cardData": [], "siblings": []}',
    b'{"id": "a", "cardData": {"configs": 3}, "siblings": []}'])
def test_invalid_responses_are_retried_and_then_a_user_error(edu, use_hub, monkeypatch, garbage):
    """The login page of a hotel network, or unrelated JSON, may come from a proxy, so it is retried."""
    monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.001)
    with serve(edu, [("GET", "/api/datasets/", garbage)] * 8) as server:
        use_hub(server)
        with pytest.raises(UserError, match=EDU):
            hub.resolve_dataset(EDU, "sample-10BT")


@pytest.mark.parametrize("flags, message", [
    (["--text_column", "content"], "no column 'content' among id, text; choose one with --text_column"),
    (["--shard_tokens", "10000000"], "inside the validation shard of 10,000,000; use a smaller --shard_tokens"),
    (["--name", "none"], "no configuration 'none'")])
def test_errors_print_one_line(edu, prepare_from, tmp_path, flags, message):
    with serve(edu) as server:
        rc, _, err = prepare_from(server, *flags, "--num_proc", 0, "--out", tmp_path / "out")
    assert rc == 2 and message in err and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("*.npy"))


def test_another_command_may_use_a_folder_without_a_finished_shard(corpus, edu, prepare_from, tmp_path):
    with serve(edu) as server:
        assert prepare_from(server, "--shard_tokens", 10**7, "--num_proc", 0, "--out", tmp_path / "out")[0] == 2
        rc, _, err = prepare_from(server, "--shard_tokens", 20_000, "--num_proc", 0, "--out", tmp_path / "out")
    assert rc == 0, err
    assert load_shards(tmp_path / "out") == build_nanogpt_shards(corpus[1], 20_000)


def test_without_a_network_it_prints_one_line(run, tmp_path):
    rc, _, err = run("-c", FAST_RETRIES, "--out", tmp_path / "out",
                     env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert rc == 2 and "cannot get HuggingFaceFW/fineweb-edu from the hub (" in err.splitlines()[-1]
    rc, _, err = run("prepare_fineweb.py", "--out", tmp_path / "out", env={"HF_HUB_OFFLINE": "1"})
    assert rc == 2 and err.count("\n") == 1
    assert "HF_HUB_OFFLINE is set; unset it, or use local files with --data_files" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["a/*", "**/sub/*.jsonl", "data-?.parquet", "./x/**"])
def test_card_patterns(pattern):
    paths = {"a/b": ["a/*"], "a/b/c": [], "sub/x.jsonl": ["**/sub/*.jsonl"], "y/z/sub/x.jsonl": ["**/sub/*.jsonl"],
             "data-1.parquet": ["data-?.parquet"], "data-12.parquet": [], "x/y/z": ["./x/**"], "data-/.parquet": []}
    found = hub._train_files_in_card("a/b", None, [{"data_files": pattern}], paths)
    assert found == [p for p in paths if pattern in paths[p]]


def test_a_pattern_that_makes_no_sense_is_a_user_error():
    with pytest.raises(UserError, match="the card of a/b: Invalid pattern"):
        hub._train_files_in_card("a/b", None, [{"data_files": "a**b"}], ["a"])


@pytest.mark.parametrize("form", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_behind_a_proxy_the_hub_is_reachable_if_the_proxy_is(run, variable, form):
    """Otherwise each file would be retried for a minute through a dead proxy before the cache is used."""
    names = {name: "" for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")}
    env = {**names, **{name.upper(): "" for name in names}, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://hub.invalid"}
    ask = lambda **more: run("-c", "from exactgpt import hub; print(hub.reachable())", env={**env, **more})[1].strip()
    with serve({}) as proxy:
        address = form.format(port=proxy.server_address[1])
        assert ask(**{variable: address}) == "True"
        assert ask(**{variable: address, "no_proxy": "hub.invalid"}) == "False"
        assert ask(**{variable: address, "HF_HUB_OFFLINE": "1"}) == "False"
    assert ask() == "False"
