"""finetune_classifier.py: a text's last token decides, frozen layers stay, a stopped run goes on, exports agree."""
import csv
import json
import os
import re
import signal

import numpy as np
import pytest
import torch

import convert
import finetune_classifier
import inference
from exactgpt import checkpoint, finetune
from exactgpt.checkpoint import read_checkpoint
from exactgpt.classifier import Classifier, ClassifierConfig
from exactgpt.config import UserError
from exactgpt.finetune import make_batches, print_examples
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer
from finetune_classifier import encode_example, read_splits, score_examples
from model import GPT, GPTConfig
from tests.common import SHARED_DATA, cpu_runtime
from tests.signals import signalled

CPU = ("--device", "cpu", "--dtype", "fp32")


def main(*flags):
    finetune_classifier.main([str(f) for f in flags])


def tokens(text):
    return encode_example(text, 0, Tokenizer([], "bytes"), 32)


# -----------------------------------------------------------------------------
# the model and its examples

def test_scores_are_those_of_the_last_token_of_each_text_whatever_pads_it():
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(32, 320, 2, 2, 32, labels=["a", "b", "c"])).eval()
    texts = ["x", "", "a longer one", "b" * 100, "seventeen letters", "no"]
    examples = [tokens(text) for text in texts]
    together = score_examples(model, cpu_runtime(), examples, micro_batch_tokens=64)
    for text, scores in zip(texts, together):
        ids = Tokenizer([], "bytes").encode(text)[:32] or [256]
        alone = model.score(model.hidden(torch.tensor([ids])))[0, -1]
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)


def test_a_long_text_is_read_from_its_beginning():
    example = tokens("beginning" + "x" * 50)
    assert Tokenizer([], "bytes").decode(example.tokens.tolist()) == "beginning" + "x" * 23
    assert example.targets.tolist() == [-1] * 31 + [0]


def test_the_score_layer_is_drawn_as_gpt2s_weights_are():
    torch.manual_seed(0)
    gpt, config = GPT(GPTConfig(8, 65, 1, 1, 512)), ClassifierConfig(8, 65, 1, 1, 512, labels=["a", "b"])
    for model in (Classifier.from_gpt(gpt, list("abcd")), Classifier(config)):
        weight = model.score.weight.detach()
        assert abs(weight.std().item() - 0.02) < 0.002 and abs(weight.mean().item()) < 0.003


def test_of_epochs_that_label_alike_the_one_with_the_lower_loss_is_better(classifier_flags, tmp_path, monkeypatch):
    found = []

    def evaluate_twice(run, progress, config, runtime, evaluate, write_results):
        run.model.eval()
        for scale in (1, 20):       # the same labels, with other probabilities
            with torch.no_grad():
                run.model.score.weight.mul_(scale)
            found.append(evaluate())
    monkeypatch.setattr(finetune, "train", evaluate_twice)
    main(*classifier_flags(tmp_path / "out"))
    (first, logged), (second, logged_then) = found
    assert logged["macro_f1"] == logged_then["macro_f1"] and logged["val_loss"] != logged_then["val_loss"]
    assert (second > first) == (logged_then["val_loss"] < logged["val_loss"]) and second != first


def test_batches_hold_every_example_once_padded_with_what_does_not_count():
    examples = [tokens("x" * n) for n in (5, 30, 1, 17, 16, 2)]
    seen = []
    for members, x, y in make_batches(examples, 64, 32):
        assert x.shape == y.shape and (x.numel() <= 64 or len(x) == 1) and x.size(1) <= 32
        for i, targets in zip(members, y.tolist()):
            n = len(examples[i])
            assert targets[:n] == examples[i].targets.tolist() and set(targets[n:]) <= {-1} and targets[n - 1] == 0
        seen += members
    assert sorted(seen) == list(range(6)) and [len(examples[i]) for i in seen] == [30, 17, 16, 5, 2, 1]


def test_an_example_shows_that_the_label_alone_is_learned():
    shown = []
    print_examples([tokens("caf\u00e9!")], Tokenizer([], "bytes"), lambda ids: f"-> {['bad', 'good'][ids[0]]}",
                   shown.append)
    assert shown == ["example 1: 6 tokens, 1 target\n  masked  | 'caf\u00e9!'\n  learned | '-> bad'"]


# -----------------------------------------------------------------------------
# the script

def test_it_learns_two_classes_of_any_two_columns_predicts_and_travels_to_transformers(
        classifier_flags, reviews, byte_model, tmp_path, capsys):
    out = tmp_path / "out"
    main(*classifier_flags(out), "--class_weights", "balanced")
    said = capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text())
    test = report["test"]
    assert test["accuracy"] == 1 and test["macro_f1"] == 1 and report["labels"] == ["bad", "good"], said
    assert test["confusion"] == [[8, 0], [0, 24]] and test["per_label"]["bad"] == dict(precision=1, recall=1, f1=1, n=8)
    assert report["examples"] == dict(train=112, test=32, validation=16)
    assert report["base"]["source"] == str(byte_model[0])
    assert (out / "confusion.png").stat().st_size > 1000 and not (out / "classifier.pt.tmp").exists()
    assert "next: python finetune_classifier.py --checkpoint" in said

    main("--checkpoint", out / "classifier.pt", "--predict", "So lovely b", "--predict", "A poor c", *CPU)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("good (bad 0.") and lines[1].startswith("bad (bad 0.")
    assert lines[0].endswith(": So lovely b") and lines[1].endswith(": A poor c")
    check_export(out / "classifier.pt", tmp_path, capsys)
    with pytest.raises(UserError, match="is a classifier \\(bad, good\\), not a language model"):
        inference.main(["--checkpoint", str(out / "classifier.pt"), "--prompt", "x"])
    main(*classifier_flags(out), "--class_weights", "balanced")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"contains another run: --seed 5 \(it has 1337\)"):
        main(*classifier_flags(out), "--class_weights", "balanced", "--seed", 5)
    other = tmp_path / "other.csv"
    other.write_bytes(reviews.read_bytes())
    with pytest.raises(UserError, match=r"contains another run: --data .*other\.csv"):
        main(*classifier_flags(out, other), "--class_weights", "balanced")


def check_export(path, tmp_path, capsys):
    """The export of a classifier gives our probabilities in transformers, alone and padded, and comes back."""
    from transformers import AutoModelForSequenceClassification, pipeline
    convert.main(["--checkpoint", str(path), "--out", str(tmp_path / "hf")])
    assert 'pipeline("text-classification"' in capsys.readouterr().out
    texts = ["A fine d", "", "So boring, truly, x", "y" * 50]
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(f'"{t}"' for t in texts) + "\n")
    for name, source in (("ours.csv", path), ("theirs.csv", tmp_path / "hf")):
        main("--checkpoint", source, "--predict_file", tmp_path / "new.csv", "--out", tmp_path / name, *CPU)
    for name, text, n in (("no.txt", "", 0), ("blank.txt", "\n", 1), ("two.txt", "a\n\n", 2), ("open.txt", "a\nb", 2)):
        (tmp_path / name).write_text(text)
        main("--checkpoint", path, "--predict_file", tmp_path / name, "--out", tmp_path / f"{name}.jsonl", *CPU)
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == n
    with pytest.raises(UserError, match=r"new\.csv already exists and will not be overwritten"):
        main("--checkpoint", path, "--predict_file", tmp_path / "new.csv", "--out", tmp_path / "new.csv", *CPU)
    ours, theirs = (list(csv.DictReader(open(tmp_path / name))) for name in ("ours.csv", "theirs.csv"))
    assert ours == theirs and [row["text"] for row in ours] == texts
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "GPT2ForSequenceClassification" and model.config.id2label == {0: "bad", 1: "good"}
    classify = pipeline("text-classification", str(tmp_path / "hf"), top_k=None)
    found = classify([t for t in texts if t], batch_size=3, truncation=True)
    for row, scores in zip([row for row in ours if row["text"]], found):
        p = {item["label"]: item["score"] for item in scores}
        assert abs(p["bad"] - float(row["p(bad)"])) < 1e-4 and abs(p["good"] - float(row["p(good)"])) < 1e-4


@pytest.mark.parametrize("train", ["head", "last:1", "lora", "all"])
def test_frozen_layers_do_not_move_and_the_others_do(classifier_flags, byte_model, tmp_path, train):
    main(*classifier_flags(tmp_path / "out"), "--train", train, "--num_epochs", 1, "--test_fraction", 0)
    after, before = read_checkpoint(tmp_path / "out" / "classifier.pt")["model"], byte_model[1].state_dict()
    moved = {name for name in after if name != "score.weight" and not torch.equal(after[name], before[name])}
    expected = dict(head=set(), all=set(after) - {"score.weight"},
                    lora={n for n in after if ".h." in n and n.endswith(("c_attn.weight", "c_proj.weight",
                                                                        "c_fc.weight"))})
    expected["last:1"] = {n for n in after if n.startswith(("transformer.h.1.", "transformer.ln_f."))}
    assert moved == expected[train]
    assert open_model(tmp_path / "out" / "classifier.pt", classifiers=True).model.config.labels == ["bad", "good"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_classifier(run, classifier_flags, tmp_path, capsys):
    extra = ("--dropout", 0.1, "--train", "last:1", "--num_epochs", 3, "--patience", 0)
    straight, stopped = ((*classifier_flags(tmp_path / name), *extra) for name in ("straight", "stopped"))
    main(*straight)
    (tmp_path / "stop.py").write_text(signalled("finetune_classifier", 10, "SIGTERM"))
    rc, out, err = run(str(tmp_path / "stop.py"), *stopped)
    assert rc == 0 and "stopped before step 11, nothing is lost" in out, err
    for more, message in ((["--seed", 2], "contains another run: --seed 2 (it has 1337)"),
                          (["--resume", "never"], "already contains a run")):
        with pytest.raises(UserError, match=re.escape(message)):
            main(*stopped, *more)
    main(*stopped)
    assert "resuming from step 11" in capsys.readouterr().out
    first, second = (read_checkpoint(tmp_path / name / "classifier.pt")["model"] for name in ("straight", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == 21 + 4


def test_a_damaged_state_costs_the_steps_since_the_one_before_and_a_full_disk_nothing(
        classifier_flags, tmp_path, monkeypatch, capsys):
    flags = (*classifier_flags(tmp_path / "out"), "--num_epochs", 4, "--patience", 0)
    straight = (*classifier_flags(tmp_path / "straight"), "--num_epochs", 4, "--patience", 0)
    original, real_save = finetune.train_step, checkpoint.save_checkpoint

    def killed_before(at):
        def train_step(run, config, runtime, step):
            if step == at:
                raise KeyboardInterrupt      # nothing is saved, as by kill -9
            return original(run, config, runtime, step)
        return train_step

    def full_disk(path, entries):
        if "state" in path.name and entries.get("step") == 14:
            raise UserError("cannot write: No space left on device")
        real_save(path, entries)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "train_step", killed_before(22))
        patch.setattr(checkpoint, "save_checkpoint", full_disk)
        main(*flags)
    out = capsys.readouterr().out
    assert out.count("warning: checkpoint not written (older ones are intact)") == 1
    # Refused after the second epoch, at step 14; tried again at step 20, and as usual at 21.
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == ["state_00020.pt", "state_00021.pt"]
    newest = tmp_path / "out" / "state_00021.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    main(*flags)
    out = capsys.readouterr().out
    assert "skipping a checkpoint: cannot load" in out and "resuming from step 20" in out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == ["classifier.pt", "state_00028.pt"]
    main(*straight)
    first, second = (read_checkpoint(tmp_path / name / "classifier.pt")["model"] for name in ("straight", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    main(*flags)
    assert "is finished; for a new run use another --out" in capsys.readouterr().out
    for damage in (b"", b"not a checkpoint"):
        (tmp_path / "out" / "state_00028.pt").write_bytes(damage)
        with pytest.raises(UserError, match=r"no checkpoint in .*out can be resumed"):
            main(*flags)


def test_a_stop_while_texts_are_scored_is_heard_after_a_batch(classifier_flags, tmp_path, monkeypatch, capsys):
    """At the evaluation after the only epoch: the state is saved. At a prediction: nothing is written."""
    batches, calls = finetune.evaluation_batches, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(*arguments)
    monkeypatch.setattr(finetune, "evaluation_batches", stop_at_the_second)
    flags = (*classifier_flags(tmp_path / "out"), "--num_epochs", 1)
    main(*flags)
    assert "stopped before step 7, nothing is lost" in capsys.readouterr().out and len(calls) == 2
    main(*flags)
    assert "resuming from step 7" in capsys.readouterr().out
    calls[:] = calls[:1]
    with pytest.raises(SystemExit) as ended:
        main("--checkpoint", tmp_path / "out" / "classifier.pt", "--predict", "So fine", *CPU)
    assert ended.value.code == 130 and "stopped before there was a result" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_find_the_classifier_of_one(run_ranks, classifier_flags, tmp_path):
    extra = ("--num_epochs", 1, "--batch_size", 111)       # the epoch's second step has one row: a rank has none
    codes, output = run_ranks(2, "finetune_classifier.py", *classifier_flags(tmp_path / "two"), *extra)
    assert codes == [0, 0] and "2 processes" in output, output
    main(*classifier_flags(tmp_path / "one"), *extra)
    one, two = (read_checkpoint(tmp_path / name / "classifier.pt")["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_a_dry_run_shows_examples_and_leaves_nothing(classifier_flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(*classifier_flags("out")[:-2], "--dry_run")
    out = capsys.readouterr().out
    assert "example 1: " in out and "  masked  | " in out and ("learned | '-> good'" in out or "'-> bad'" in out)
    assert "dry run: " in out and "the full run of 42 steps" in out and sorted(tmp_path.rglob("*")) == before


def test_splits_hold_every_example_once_and_every_label_in_its_share(tmp_path):
    examples = [(f"text {i}", "abc"[(i % 10 > 5) + (i % 10 > 8)]) for i in range(200)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in examples))
    config = finetune_classifier.ClassifierTuneConfig(data=str(tmp_path / "a.csv"))
    splits = read_splits(config)
    assert sorted(splits["train"] + splits["validation"] + splits["test"]) == sorted(examples)
    for name, shares in (("train", [84, 42, 14]), ("validation", [12, 6, 2]), ("test", [24, 12, 4])):
        assert [sum(label == letter for _, label in splits[name]) for letter in "abc"] == shares
    assert read_splits(config) == splits


def test_mistakes_are_one_line_and_name_the_row(reviews, byte_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"hole.csv": "text,label\na,x\nb,\n", "one.csv": "text,label\na,x\nb,x\nc,x\nd,x\n" * 1 + "e,x\n" * 9,
             "rare.csv": "text,label\n" + "a,x\n" * 20 + "b,y\n", "torn.jsonl": '{"text": "a", "label": 1}\n{"text"\n',
             "ids.csv": "text,label\n" + "".join(f"a{i % 9},{i // 2}\n" for i in range(100)),
             "two.csv": "text,label\n" + "a,x\nb,y\n" * 20, "other.csv": "text,label\na,x\nb,z\n",
             "few.csv": "text,label\n" + "a,x\n" * 40 + "b,y\n" * 2}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    model = ("--init_from", byte_model[0], "--out", "out")
    for flags, message in (
            (["--data", reviews, *model], "no column 'text' among review, sentiment, stars; choose one with --text_col"
                                          "umn and --label_column"),
            (["--data", "hole.csv", *model], "hole.csv, row 2 (the header not counted): column 'label' is empty"),
            (["--data", "torn.jsonl", *model], "torn.jsonl, line 2: not valid JSON"),
            (["--data", "one.csv", *model], "holds 1 different value in 13 rows, but a classifier needs 2 to 20"),
            (["--data", "rare.csv", *model], "the rarest label, 'y', occurs 1 time"),
            (["--data", "few.csv", "--test_fraction", 0.1, "--val_fraction", 0.85, *model],
             "cannot split 36 of 38 rows off with every label on both sides; the rarest label, 'y', occurs 2 times"),
            (["--data", "ids.csv", *model], "is it the column of labels?"),
            (["--data", "two.csv", "--val_data", "other.csv", *model], "other.csv, row 2 (the header not counted): the "
                                                                       "label 'z' is not in two.csv (x, y)"),
            (["--data", "two.csv", *model, "--train", "last:3"], "--train last:3, but "),
            (["--data", "two.csv", *model, "--train", "some"], "--train must be all, last:N, head or lora"),
            (["--data", "two.csv", *model, "--block_size", 64], "have 32 positions, block_size 64 needs more"),
            (["--data", "two.csv", "--out", "out"], "--init_from is missing"),
            (["--predict", "x"], "--checkpoint is missing"),
            (["--predict", "x", "--checkpoint", byte_model[0]], "is a language model, not a classifier"),
            (["--predict_file", "two.csv", "--checkpoint", byte_model[0]], "must be used together"),
            (["--predict_file", "two.csv", "--out", "x.txt", "--checkpoint", byte_model[0]],
             "must end in .csv or .jsonl")):
        with pytest.raises(UserError) as caught:
            main("--device", "cpu", *flags)
        assert message in str(caught.value), flags


def test_the_sms_file_is_read_and_split(monkeypatch):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    config = finetune_classifier.ClassifierTuneConfig(data=str(SHARED_DATA / "sms_spam.tsv"), text_column="SMS",
                                                 label_column="Label")
    splits = read_splits(config)
    assert {name: len(examples) for name, examples in splits.items()} == dict(train=3902, validation=557, test=1115)
    assert np.isclose(sum(label == "spam" for _, label in splits["test"]) / 1115, 747 / 5574, atol=1e-3)
