"""bench.hellaswag times a sample of the examples and warms up the slow baseline on fewer."""
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from bench import hellaswag
from exactgpt.tokenizer import Tokenizer


@pytest.mark.parametrize("device, flags, scored, warmed", [
    ("cuda", [], 2000, 32), ("cpu", [], 96, 32), ("cuda", ["--limit", "0"], 3000, 32), ("cpu", ["--limit", "7"], 7, 7)])
def test_one_at_a_time_is_warmed_on_few_examples_and_ours_on_all(monkeypatch, tmp_path, device, flags, scored, warmed):
    examples = [dict(ctx="a", endings=["b", "c", "d", "e"], label=0) for _ in range(3000)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    counts = dict(score_packed=[], score_one_at_a_time=[])
    runtime = SimpleNamespace(world_size=1, device=torch.device(device), dtype_name="fp32", setup_done=lambda: None)
    monkeypatch.setattr(hellaswag, "start", lambda config: contextlib.nullcontext(runtime))
    monkeypatch.setattr(hellaswag, "make_model", lambda *args: (SimpleNamespace(
        config=SimpleNamespace(block_size=8)), Tokenizer([], "bytes")))
    for name, size in (("score_packed", lambda prepared: len(prepared.questions)), ("score_one_at_a_time", len)):
        def count(model, items, *others, name=name, size=size):
            counts[name].append(size(items))
            return 0.25, 0.25
        monkeypatch.setattr(hellaswag, name, count)
    monkeypatch.setattr(hellaswag, "write_results", lambda *args: None)
    hellaswag.main(["--data", str(tmp_path / "items.jsonl"), "--repeats", "2", *flags])
    assert counts == dict(score_packed=[scored] * 3, score_one_at_a_time=[warmed, scored, scored])
