"""hellaswag.py's data: loading, errors that name the line, rendering in both styles, and the download."""
import json
import sys
import types
from types import SimpleNamespace

import pytest

import hellaswag
import train
from exactgpt.config import UserError
from exactgpt.tokenizer import Tokenizer
from hellaswag import DATA_FILE, fetch_hellaswag, load_hellaswag, main, parse_example, prepare_hellaswag
from model import GPT, GPTConfig
from tests.common import HELLASWAG_EXAMPLE, HELLASWAG_FILE, cpu_runtime


@pytest.mark.parametrize("ctx, rendered", [
    ("A man is sitting on a roof. he", "A man is sitting on a roof. He"),
    ("He waits! Then it rains.  the Dog", "He waits! Then it rains. The dog"),
    ("first. then he Waits. it Rains", "first. then he Waits. It rains"),
    ('"Stop!" the Man', '"Stop!" The man'),
    ("A man is sitting on a roof. He Sees", "A man is sitting on a roof. He Sees"),
    ("first. then Two sentences. That end Here.", "first. then Two sentences. That end Here."),
    ("it ends. with a Space. ", "it ends. with a Space."),
    ("no Sentence end at all", "no Sentence end at all"),
    ("It costs 3.50 a Piece", "It costs 3.50 a Piece"),
    ("", ""),
])
def test_in_lm_eval_style_what_follows_the_last_sentence_end_begins_with_a_capital(ctx, rendered):
    item = dict(ctx=ctx, activity_label="X", endings=list("abcd"), label=0)
    assert parse_example(item, "lm_eval", "").context == f"X: {rendered}".rstrip()


def test_an_example_without_the_two_parts_renders_as_one_with_them():
    for line in HELLASWAG_FILE.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["ctx_b"][:1].islower():
            whole = parse_example(dict(item), "lm_eval", "")
            del item["ctx_a"], item["ctx_b"]
            assert parse_example(item, "lm_eval", "") == whole


def test_the_two_styles_render_as_their_originals():
    item = dict(
        activity_label="Pets", label="2", ctx="[header] How to [title] Wait. [step] Sit  down. THE cat",
        ctx_a="[header] How to [title] Wait. [step] Sit  down.", ctx_b="THE cat",
        endings=["[substeps] One [x] two.", "b", "c", "d [title] e"])
    karpathy, lm_eval = (parse_example(item, style, "") for style in hellaswag.STYLES)
    assert karpathy.context == "[header] How to [title] Wait. [step] Sit  down. THE cat"
    assert karpathy.endings == ("[substeps] One [x] two.", "b", "c", "d [title] e") and karpathy.label == 2
    assert lm_eval.context == "Pets: How to. Wait. Sit down. The cat"
    assert lm_eval.endings == (" One two.", "b", "c", "d. e")


@pytest.mark.parametrize("style, change, message", [
    ("karpathy", dict(ctx=None), "'ctx' is missing or not a string"),
    ("karpathy", dict(ctx="  "), "the context or an ending is empty"),
    ("karpathy", dict(endings=["a", "b", "c"]), "'endings' must be a list of 4 strings"),
    ("karpathy", dict(endings=["a", "b", "c", 4]), "'endings' must be a list of 4 strings"),
    ("karpathy", dict(endings="abcd"), "'endings' must be a list of 4 strings"),
    ("karpathy", dict(endings=["a", "b", " ", "d"]), "the context or an ending is empty"),
    ("lm_eval", dict(endings=["a", "[title]", "c", "d"]), "the context or an ending is empty"),
    ("karpathy", dict(label=4), "'label' must be 0 to 3, but is 4"),
    ("karpathy", dict(label=-1), "'label' must be 0 to 3, but is -1"),
    ("karpathy", dict(label=True), "'label' must be 0 to 3, but is True"),
    ("karpathy", dict(label=""), "'label' must be 0 to 3, but is ''"),
    ("lm_eval", dict(activity_label=None), "'activity_label' is missing or not a string"),
    ("lm_eval", dict(ctx_b=7), "'ctx_b' is missing or not a string"),
])
def test_an_invalid_example_is_reported_with_its_line(tmp_path, style, change, message):
    path = tmp_path / "bad.jsonl"
    items = (HELLASWAG_EXAMPLE, HELLASWAG_EXAMPLE, {**HELLASWAG_EXAMPLE, **change})
    path.write_text("\n".join(map(json.dumps, items)) + "\n")
    with pytest.raises(UserError) as caught:
        load_hellaswag(path, style)
    assert str(caught.value) == f"{path}, line 3: {message}"
    assert len(load_hellaswag(path, style, limit=2)) == 2


@pytest.mark.parametrize("data, message", [
    (b"", "is empty; it must contain one JSON example per line"),
    (b"\n \n", "is empty; it must contain one JSON example per line"),
    (json.dumps(HELLASWAG_EXAMPLE).encode() + b"\n" + json.dumps(HELLASWAG_EXAMPLE).encode()[:40],
     "line 2: not valid JSON"),
    (b"\xff\xfe{}\n", "is not UTF-8 text"),
    (b"[1, 2]\n", "line 1: must be a JSON object, but is a list"),
    (b"[" * 100_000, "line 1: not valid JSON"),
])
def test_a_damaged_file_is_reported_with_its_line(tmp_path, data, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_hellaswag(path)


def test_a_mistake_is_one_line_and_status_2(run, tmp_path):
    rc, out, err = run("hellaswag.py", "--checkpoint", tmp_path / "none.pt", "--data", HELLASWAG_FILE,
                       "--device", "cpu")
    wanted = f"hellaswag.py: error: cannot read the checkpoint {tmp_path / 'none.pt'}: No such file"
    assert (rc, out) == (2, "") and err.startswith(wanted)
    (tmp_path / "rows.jsonl").write_bytes(HELLASWAG_FILE.read_bytes())
    rc, out, err = run("hellaswag.py", "--data", tmp_path / "rows.jsonl", "--json", tmp_path / "rows.jsonl", "--device",
                       "cpu")
    assert (rc, out) == (2, "") and "rows.jsonl already exists and will not be overwritten" in err
    assert (tmp_path / "rows.jsonl").read_bytes() == HELLASWAG_FILE.read_bytes()


def fake_hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_the_data_set_is_downloaded_once_and_must_be_complete(tmp_path, monkeypatch, capsys):
    calls = []
    rows = [{**HELLASWAG_EXAMPLE, "ind": i, "label": "3", "ctx": "Ça va. elle"} for i in range(5)]
    fake_hub(monkeypatch, lambda name, split: calls.append((name, split)) or rows)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="got 5 examples, expected 10042"):
        fetch_hellaswag()
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    monkeypatch.setattr(hellaswag, "N_EXAMPLES", 5)
    main(["--download", "--device", "cpu"])
    main(["--download", "--device", "cpu"])
    assert calls == [("Rowan/hellaswag", "validation")] * 2
    assert "next:" not in capsys.readouterr().out      # there is no model yet
    prepared = prepare_hellaswag(cpu_runtime(), Tokenizer([], "bytes"), 128)
    assert prepared.labels.tolist() == [3] * 5 and [p.name for p in tmp_path.rglob("*.*")] == ["hellaswag_val.jsonl"]


def test_a_failed_download_names_a_workaround_and_train_py_another(tmp_path, monkeypatch):
    def fail(name, split):
        raise ConnectionError("no route\nto the hub")
    fake_hub(monkeypatch, fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare_hellaswag(cpu_runtime(), Tokenizer([], "bytes"), 128)
    error = str(caught.value)
    assert "\n" not in error and "ConnectionError: no route to the hub" in error
    assert "python hellaswag.py --download" in error and "--hellaswag_every" not in error
    monkeypatch.setitem(sys.modules, "datasets", None)      # not installed
    monkeypatch.setattr(train, "warm_up", None)
    run = SimpleNamespace(resolved={"hellaswag_every": 1}, tokenizer=None, raw_model=GPT(GPTConfig(8, 8, 1, 1, 8)))
    with pytest.raises(UserError, match=r"--download on a machine with a network and copy the file, or use "
                                        "--hellaswag_every 0"):
        train.prepare(run, None, None, cpu_runtime())


def choose(tokenizer_name, stored=None, flag=None, fetch=lambda: "a file"):
    """Return (what choose_hellaswag returns, what it prints) for a vocabulary, a checkpoint's `resolved` and a flag."""
    said, runtime = [], cpu_runtime()
    runtime.print = said.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fetch_hellaswag", fetch)
        every = train.choose_hellaswag(SimpleNamespace(hellaswag_every=flag), runtime,
                                       SimpleNamespace(name=tokenizer_name), stored and {"resolved": stored})
    return every, " ".join(said)


def test_without_a_flag_hellaswag_is_evaluated_where_that_is_possible_and_means_something():
    def absent():
        raise UserError("no network")
    assert choose("gpt2") == (250, "") and choose("gpt2", fetch=absent)[0] == choose("bpe-123")[0] == 0
    assert f"no HellaSwag: {DATA_FILE} is missing and cannot be downloaded" in choose("gpt2", fetch=absent)[1]
    assert "no HellaSwag: its published scores are for GPT-2's vocabulary, not for bpe-123" in choose("bpe-123")[1]
    # a resumed run goes on as it began; one of an earlier version had the flag's default
    assert choose("gpt2", {"hellaswag_every": 0}) == (0, "") and choose("gpt2", {"hellaswag_every": 99}) == (99, "")
    assert choose("gpt2", {}) == (250, "") and choose("gpt2", {"hellaswag_every": 99}, fetch=absent)[0] == 0
    # a flag that was typed holds, and whatever it needs is looked for later
    assert choose("bpe-123", {"hellaswag_every": 0}, 7, absent) == (7, "") and choose("gpt2", None, 0) == (0, "")
