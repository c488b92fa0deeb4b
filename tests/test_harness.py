"""evaluate.py --tasks: item by item what lm-evaluation-harness' own Hugging Face model says of the exported weights."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from exactgpt import harness
from exactgpt.checkpoint import save_checkpoint
from exactgpt.error_bars import ratio_stderr
from exactgpt.huggingface import write_pretrained
from exactgpt.open_model import open_model
from exactgpt.scoring import ending_losses
from exactgpt.tokenizer import train_tokenizer
from hellaswag import load_hellaswag, score_items, tokenize_examples
from model import GPT, IGNORED, GPTConfig
from tests.common import HELLASWAG_FILE, cpu_runtime, refusal

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-extras.txt)")

# The data sets as they lie on the hub; what `datasets` finds in the working directory it does not download.
DATA = {"Rowan/hellaswag": "", "EleutherAI/lambada_openai": "", "EleutherAI/wikitext_document_level":
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: validation, path: validation.jsonl}\n  - {split: test, path: test.jsonl}\n---\n"}
GENERATION = """
task: ask
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e", "qq"], max_gen_toks: 12, do_sample: false}}
metric_list:
- {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: endings
doc_to_target: label
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GROUP = "group: both\ntask: [first, second]\naggregate_metric_list:\n- {metric: acc, weight_by_size: true}\n"
TASKS = ("hellaswag", "lambada_openai", "wikitext", "ask")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Return a folder with the data of the tasks, a task of our own in tasks/, and a.pt, b.pt and a/ (exported)."""
    here = tmp_path_factory.mktemp("harness")
    examples = [json.loads(line) for line in HELLASWAG_FILE.read_text().splitlines()]
    texts = [f"{e['ctx']} {e['endings'][e['label']]}" for e in examples]
    rows = {"Rowan/hellaswag": examples, "EleutherAI/lambada_openai": [{"text": text.rstrip(".")} for text in texts],
            "EleutherAI/wikitext_document_level": [{"page": " = A title = \n" + " ".join(texts[k:k + n])}
                                                   for k, n in ((0, 1), (3, 4), (7, 9))]}
    for name, card in DATA.items():
        (here / name).mkdir(parents=True)
        (here / name / "README.md").write_text(card)
        for split in ("train", "validation", "test"):
            (here / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    (here / "tasks").mkdir()
    (here / "questions.jsonl").write_text("".join(
        json.dumps({"question": text[:n], "answer": "x"}) + "\n"      # one is longer than the window
        for text, n in zip([texts[0], "".join(texts), *texts[2:]], (3, 900, 30, 9, 70))))
    (here / "tasks" / "ask.yaml").write_text(GENERATION.format(file=here / "questions.jsonl"))
    for name in ("first", "second"):
        (here / "tasks" / f"{name}.yaml").write_text(CHOICE.format(name=name, file=HELLASWAG_FILE))
    (here / "tasks" / "both.yaml").write_text(GROUP)
    tokenizer = train_tokenizer(texts, 320)      # a multiple of 64: no rows of padding, which exports leave out
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(192, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32))
        learn(model, [tokenizer.encode(text) for text in texts], 50)
        save_checkpoint(here / f"{name}.pt", dict(model=model.state_dict(), config=model.config_dict(), step=1,
                                                  val_loss=1.0, tokenizer=tokenizer.to_checkpoint()))
        write_pretrained(here / name, model.config_dict(), model.state_dict(), tokenizer)
    return here


def learn(model, rows, steps):
    """Train a model until it knows a part of some texts by heart, so that some of its answers are right."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding_value=IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(tokens[:, :-1].clamp(min=0), tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def in_place(here, monkeypatch):
    """Work in the folder, with a cache of its own, and few of the harness' 14,000 tasks, whose index takes 6 s."""
    import datasets
    from lm_eval import evaluator, tasks  # noqa: F401  the first takes the TaskManager from the second as it is now
    monkeypatch.chdir(here)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    monkeypatch.setattr(tasks, "TaskManager", task_manager)
    return here


def task_manager(include_path=None):
    import lm_eval.tasks
    from lm_eval.tasks.manager import TaskManager
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = [str(theirs / name) for name in ("hellaswag", "lambada", "wikitext", "piqa")]
    return TaskManager(include_path=[*folders, *filter(None, [include_path])], include_defaults=False)


def by_item(results, name):
    """Return the samples of a task in the order of its items."""
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


@pytest.mark.slow
def test_four_kinds_of_task_item_by_item(in_place, capsys, monkeypatch):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.evaluate", lambda **options: kept.append(evaluator.evaluate(**options)) or kept[0])
        evaluate.main(["--tasks", ",".join(TASKS), "--include_path", str(in_place / "tasks"), "--checkpoint", "a.pt",
                       "--device", "cpu", "--dtype", "fp32", "--json", "ours.json", "--batch_tokens", "700"])
    out = capsys.readouterr().out
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)      # it starts pip and takes seconds
    theirs = evaluator.simple_evaluate(
        model=HFLM(pretrained=str(in_place / "a"), device="cpu", dtype="float32", batch_size=3), tasks=list(TASKS),
        task_manager=task_manager(str(in_place / "tasks")), bootstrap_iters=harness.BOOTSTRAPS, log_samples=True)
    for name in TASKS:
        for mine, other in zip(by_item(kept[0], name), by_item(theirs, name), strict=True):
            assert mine["arguments"] == other["arguments"] and mine["doc_hash"] == other["doc_hash"]
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                assert a == b if name == "ask" else np.ravel(a) == pytest.approx(np.ravel(b), rel=2e-5)
    answers = [sample["filtered_resps"][0] for sample in by_item(theirs, "ask")]
    assert len(set(answers)) > 2 and not any("e" in answer for answer in answers)
    ours = json.loads((in_place / "ours.json").read_text())
    for name, metrics in theirs["results"].items():
        known = {key: value for key, value in metrics.items() if isinstance(value, float)}
        assert {key: ours["results"][name][key] for key in known} == pytest.approx(known, rel=2e-5)
    # of each kind of answer some are right and some are not
    assert all(0 < theirs["results"][name][f"{metric},none"] < 1 for name, metric in (
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "acc")))
    # the harness has no standard errors of these; here from its own log-likelihoods
    wikitext = by_item(theirs, "wikitext")
    assert theirs["results"]["wikitext"]["word_perplexity_stderr,none"] == "N/A"
    sums, words = np.array([sample["word_perplexity"] for sample in wikitext]).T
    _, stderr = ratio_stderr(sums, words)
    assert ours["results"]["wikitext"]["word_perplexity_stderr,none"] == pytest.approx(
        stderr * theirs["results"]["wikitext"]["word_perplexity,none"], rel=1e-3)
    assert all(isinstance(v, float) for m in ours["results"].values() for k, v in m.items() if "_stderr" in k)
    assert re.search(rf"\n  hellaswag +acc +{theirs['results']['hellaswag']['acc,none']:.4f} ± 0\.", out)
    assert "bootstrapping" not in out and "%|" not in out


@pytest.mark.slow
def test_hellaswag_py_in_lm_eval_style_agrees_item_by_item(in_place):
    from lm_eval import evaluator
    opened, runtime = open_model("a.pt"), cpu_runtime()
    examples = load_hellaswag(HELLASWAG_FILE, "lm_eval")
    prepared = tokenize_examples(examples, opened.tokenizer, 192, "lm_eval")
    losses = ending_losses(opened.model, prepared.questions, 4, runtime).reshape(-1, 4)
    right, right_norm = score_items(opened.model, prepared, runtime)
    loaded = harness.load_tasks(["hellaswag"], "", None, runtime)
    results = evaluator.evaluate(lm=harness.make_lm(opened.model, opened.tokenizer, runtime), task_dict=loaded)
    samples = by_item(results, "hellaswag")
    assert [e.context for e in examples] == [s["arguments"][0][0] for s in samples]
    assert [[" " + c for c in e.endings] for e in examples] == [[a[1] for a in s["arguments"]] for s in samples]
    assert any(e.context != e.context.rstrip() for e in examples)       # one has a space that must move
    np.testing.assert_allclose(-losses, [[r[0] for r in s["filtered_resps"]] for s in samples], rtol=2e-5)
    assert right.tolist() == [s["acc"] for s in samples] and right_norm.tolist() == [s["acc_norm"] for s in samples]
    assert 0 < right.sum() < 20 and right.tolist() != right_norm.tolist()


@pytest.mark.slow
def test_two_models_are_compared_item_by_item(in_place, capsys):
    evaluate.main(["--tasks", "hellaswag,wikitext,lambada_openai", "--checkpoint", "a.pt", "--compare", "b.pt",
                   "--device", "cpu", "--dtype", "fp32", "--json", "two.json", "--num_fewshot", "1"])
    result = json.loads((in_place / "two.json").read_text())
    for name, metric in (("hellaswag", "acc_norm,none"), ("wikitext", "bits_per_byte,none"),
                         ("wikitext", "word_perplexity,none"), ("lambada_openai", "perplexity,none")):
        c = result["compare"][name][metric]
        mine, other = result["results"][name][metric], result["other"]["results"][name][metric]
        assert c["difference"] == pytest.approx(mine - other) and c["low"] <= c["difference"] <= c["high"]
        assert (c["better"] > c["worse"]) == ((mine > other) == (name == "hellaswag"))
    assert result["n-shot"]["hellaswag"] == 1
    flips = result["compare"]["hellaswag"]["acc_norm,none"]
    assert flips["better"] - flips["worse"] == pytest.approx(20 * flips["difference"]) and flips["n"] == 20
    assert "20 items are too few to tell a difference from noise: use 30 or more." in capsys.readouterr().out


def test_a_task_that_cannot_be_run_is_refused(in_place):
    runtime = cpu_runtime()
    assert "no task 'helaswag'; did you mean hellaswag" in refusal(harness.load_tasks, ["helaswag"], "", None, runtime)
    message = refusal(harness.load_tasks, ["piqa"], "", None, runtime)
    assert "cannot load piqa or its data (" in message and "docs/evaluation.md" in message
    assert "has only 20 examples, too few for --num_fewshot 20" in refusal(
        harness.load_tasks, ["first"], str(in_place / "tasks"), 20, runtime)
    (in_place / "tasks" / "beams.yaml").write_text(GENERATION.format(file=in_place / "questions.jsonl").replace(
        "task: ask", "task: beams").replace("do_sample: false", "num_beams: 4"))
    assert "uses num_beams = 4 to generate, which" in refusal(
        harness.load_tasks, ["beams"], str(in_place / "tasks"), None, runtime)


@pytest.mark.slow
def test_both_models_get_the_same_examples_and_a_group_is_compared_on_all_its_items(in_place, capsys):
    def compare(other, out):
        evaluate.main(["--tasks", "both", "--include_path", str(in_place / "tasks"), "--checkpoint", "a.pt",
                       "--compare", other, "--device", "cpu", "--dtype", "fp32", "--json", out])
        return json.loads((in_place / out).read_text())
    same = compare("a.pt", "same.json")
    assert same["compare"].keys() == {"both", "first", "second"} and same["n-shot"]["first"] == 2
    for metrics in same["compare"].values():
        assert metrics["acc,none"]["difference"] == metrics["acc,none"]["better"] == metrics["acc,none"]["worse"] == 0
    assert same["results"] == same["other"]["results"]
    result = compare("b.pt", "groups.json")
    both = result["compare"]["both"]["acc,none"]
    assert both["n"] == 40 and both["difference"] == pytest.approx(
        result["results"]["both"]["acc,none"] - result["other"]["results"]["both"]["acc,none"])
    assert "Of 3 such comparisons of equal models, about 0.1 would seem more than noise." in capsys.readouterr().out


def test_what_has_no_direction_or_is_no_number_is_not_compared():
    from lm_eval.api.metrics import mean
    def metric(values, higher=True):
        task = SimpleNamespace(aggregation=lambda: {"m": mean}, higher_is_better=lambda: {"m": higher})
        return harness.make_metric("task", "m,none", values, task)
    assert metric({3: 1, 4: 0.5}).values == {3: (1, 1), 4: (0.5, 1)}
    assert metric({3: 1}, None) is metric({3: "a"}) is metric({3: [1, 2, 3]}) is None
    ours, theirs = (harness.TaskResults({}, {("t", "m,none"): metric({i: float(i % 2 == which) for i in items})}, {})
                    for which, items in ((0, range(40)), (1, range(4, 44))))
    comparison, = harness.compare_tasks(ours, theirs).values()      # on the items that both have
    assert (comparison.n, comparison.better, comparison.worse, comparison.difference) == (36, 18, 18, 0)


def test_a_diverged_model_and_empty_continuations(here):
    opened = open_model(here / "a.pt")
    pairs = [([5], []), ([5, 6], [7]), ([5, 6], []), ([5, 6], [8, 9])]
    scores = harness.score_continuations(opened.model, pairs, cpu_runtime(), 0)
    assert scores[0] == scores[2] == (0.0, True) and scores[1][0] < 0 and scores[3][0] < 0
    assert scores[3] == pytest.approx(harness.score_continuations(opened.model, pairs[3:], cpu_runtime(), 0)[0])
    with torch.no_grad():
        opened.model.transformer.ln_f.weight[0] = torch.nan
    assert "not finite numbers" in refusal(harness.score_continuations, opened.model, pairs, cpu_runtime(), 0)


def test_samples_differ_from_batch_to_batch_and_repeat(here, monkeypatch):
    monkeypatch.setattr(harness, "GENERATION_ROWS", 4)
    opened, requests = open_model(here / "a.pt"), [("The", dict(until=[], max_gen_toks=8, do_sample=True))] * 8
    texts, again = (harness.continue_texts(opened.model, opened.tokenizer, requests, cpu_runtime()) for _ in range(2))
    assert texts == again and len(set(texts)) == 8
