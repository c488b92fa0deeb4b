"""app.py, run by Streamlit's AppTest: what the page shows, and the model that all visitors share."""
import gc
import io
import json
import os
import sys
import threading
import weakref

import pytest
import torch

from exactgpt.checkpoint import checkpoint_path, save_checkpoint
from exactgpt.config import UserError
from exactgpt.generation import generate, stream, top_next_tokens
from exactgpt.open_model import open_model
from exactgpt.tokenizer import Tokenizer
from model import GPT, GPTConfig

st = pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest  # noqa: E402

import app  # noqa: E402
from tests.common import ROOT  # noqa: E402

BYTES = Tokenizer([], "bytes")


def save_model(path, seed=0, step=7):
    """Save a tiny byte-level model as a checkpoint; return the model."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, 320, 1, 2, 16)).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict(), step=step, val_loss=5.5,
                               tokenizer=BYTES.to_checkpoint()))
    return model


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page(*flags) -> the AppTest of a new visitor, run once in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])     # Streamlit replaces it; forks run it
    st.cache_resource.clear()

    def open_page(*flags):
        monkeypatch.setattr(sys, "argv", ["app.py", "--device", "cpu", "--dtype", "fp32", *map(str, flags)])
        return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    return open_page


def html_of(at):
    """Return all HTML on the page."""
    return "\n".join(element.proto.body for element in at.get("html"))


def slider(at, label):
    return next(s for s in at.slider if s.label == label)


def test_it_generates_the_text_of_generate_with_the_settings_of_the_sliders(page, tmp_path):
    model = save_model(tmp_path / "logs" / "demo" / "model_00007.pt")
    at = page()
    assert not at.exception and {"5.5000", "1, 2, 16"} < {metric.value for metric in at.metric}
    slider(at, "Temperature").set_value(1.3)
    slider(at, "Top-k").set_value(7)
    slider(at, "Top-p").set_value(0.9)
    slider(at, "Maximum length").set_value(40)
    slider(at, "Samples side by side").set_value(3)
    at.number_input[0].set_value(11)
    at.text_area(key="prompt").set_value("<b>Once</b> *upon*").run()
    at.button(key="write").click().run()
    texts, n_tokens = generate(model, BYTES, ["<b>Once</b> *upon*"] * 3, temperature=1.3, top_k=7, top_p=0.9, seed=11,
                               max_tokens=40)
    generated = at.session_state.generated
    assert not at.exception and [generated.prompt + text for text in generated.texts] == texts
    shown = html_of(at)
    assert shown.count("&lt;b&gt;Once&lt;/b&gt; *upon*") == 3 and "<b>Once" not in shown
    seconds = generated.seconds
    assert f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s" in shown
    before = at.dataframe[0].value
    at.segmented_control(key="after").set_value("text 2").run()
    expected = [p for _, p in top_next_tokens(model, BYTES.encode(texts[1]), 257)]
    assert list(at.dataframe[0].value["Probability"]) == pytest.approx(expected, rel=1e-4) and not at.exception
    assert not before.equals(at.dataframe[0].value)


def test_the_bars_show_the_softmax_of_the_model(page, tmp_path):
    model = save_model(tmp_path / "logs" / "model_00001.pt")
    ids = BYTES.encode("Once upon a time, in a window of 32 tokens")
    with torch.no_grad():
        shares = torch.softmax(model(torch.tensor([ids[-32:]]))[0, -1, :257].float(), dim=-1)
    expected = sorted(enumerate(shares.tolist()), key=lambda pair: -pair[1])[:10]
    found = top_next_tokens(model, ids, 257)
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-4)
    at = page()
    at.text_area(key="prompt").set_value("Once upon a time, in a window of 32 tokens").run()
    shown = at.dataframe[0].value
    assert list(shown["Probability"]) == pytest.approx([p for _, p in expected], rel=1e-4)
    assert list(shown["Token"]) == [app.printable_token(BYTES, i) for i, _ in expected]
    names = [app.printable_token(BYTES, i) for i in (*BYTES.encode(" \n<"), 256, 255 - 33)]
    assert names[:4] == ["\u00b7", "\u21b5", "<", "end of text"] and names[4].startswith("\\x")


def test_without_a_model_it_says_how_to_get_one_and_does_not_fail(page, tmp_path):
    at = page()
    assert not at.exception and "No model selected" in at.header[0].value and "make demo" in at.code[0].value
    at.session_state["tab"] = "Training"
    at.run()
    assert not at.exception and "make demo" in at.info[0].value
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "model_00001.pt").write_bytes(b"garbage")
    at = page()
    assert not at.exception and "cannot load" in at.code[0].value
    at = page("--checkpoint", tmp_path / "gone.pt")
    assert not at.exception and "cannot read the checkpoint" in at.code[0].value
    at = page("--nonsense")
    assert not at.exception and "unknown argument --nonsense" in at.code[0].value


@pytest.mark.slow
def test_without_streamlit_one_line_says_how_to_start_it(run):
    rc, out, err = run("app.py")
    assert (rc, out) == (2, "")
    assert err.endswith("app.py: error: this is a Streamlit page; start it with: streamlit run app.py\n")


def test_a_visitor_can_open_only_the_listed_models(page, tmp_path, monkeypatch):
    save_model(tmp_path / "secret" / "model_00001.pt")
    save_model(tmp_path / "logs" / "model_00002.pt")
    opened = []
    monkeypatch.setattr("exactgpt.open_model.open_model",
                        lambda source, **options: opened.append(source) or open_model(source))
    at = page()
    assert at.selectbox(key="model").options[:2] == ["logs/model_00002.pt", "gpt2 (from the hub)"]
    with monkeypatch.context() as forged:                     # a browser may send any text as its choice
        forged.setattr(st, "selectbox", lambda *a, **k: str(tmp_path / "secret" / "model_00001.pt"))
        assert "No model selected" in at.run().header[0].value and not at.exception
    assert set(opened) == {"logs/model_00002.pt"}
    config = app.PageConfig(checkpoint="gpt2-xl")
    assert app.find_models(config) == ["gpt2-xl", "logs/model_00002.pt", "gpt2", "gpt2-medium", "gpt2-large"]
    folder = tmp_path / "logs" / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    assert "logs/hf" in app.find_models(config)


def test_prompts_and_samples_are_limited(page, tmp_path):
    save_model(tmp_path / "logs" / "model_00001.pt")
    at = page()
    assert slider(at, "Samples side by side").max == app.MAX_SAMPLES and at.text_area(key="prompt").proto.max_chars
    slider(at, "Maximum length").set_value(3)
    at.text_area(key="prompt").set_value("x" * (app.MAX_PROMPT + 100)).run()
    at.button(key="write").click().run()
    assert not at.exception and at.session_state.generated.prompt == "x" * app.MAX_PROMPT


def test_visitors_share_one_model_until_the_file_or_the_choice_changes(page, tmp_path, monkeypatch):
    first, second = tmp_path / "logs" / "model_00001.pt", tmp_path / "logs" / "model_00002.pt"
    save_model(first, step=1)
    save_model(second, step=2)
    os.utime(first, (1, 1))
    opened = []

    def recording_open_model(source, **options):
        gc.collect()
        assert not any(model() for _, model in opened)        # the old model is freed before the new one is loaded
        result = open_model(source)
        opened.append((source, weakref.ref(result.model)))
        return result
    monkeypatch.setattr("exactgpt.open_model.open_model", recording_open_model)
    at = page()
    at.text_area(key="prompt").set_value("a").run()
    other = page()
    assert [source for source, _ in opened] == ["logs/model_00002.pt"] and not other.exception
    at.selectbox(key="model").select("logs/model_00001.pt").run()
    assert [source for source, _ in opened][1:] == ["logs/model_00001.pt"] and not at.exception
    os.utime(first, (2, 2))
    at.run()
    assert [source for source, _ in opened][2:] == ["logs/model_00001.pt"] and not at.exception


def test_concurrent_visitors_get_the_same_texts_as_one_at_a_time(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_model(path)
    config = app.PageConfig(device="cpu", dtype="fp32")
    prompts, results, waits = ["Once", "Twice upon", "Thrice"], {}, []

    def generate_text(prompt):
        with app.locked_model(str(path), config, lambda: waits.append(prompt)) as (decoder, tokenizer, _):
            for continuations in stream(decoder, tokenizer, [prompt], max_tokens=60, seed=3):
                results[prompt] = continuations[0].text
    for prompt in prompts:
        generate_text(prompt)
    alone = dict(results)
    for _ in range(3):
        threads = [threading.Thread(target=generate_text, args=(p,)) for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == alone
    with pytest.raises(UserError), app.locked_model(str(tmp_path / "gone.pt"), config):
        pass
    assert app.shared()[0].acquire(timeout=0)                 # released after an error
    app.shared()[0].release()


def test_the_training_tab_updates_the_curves_and_shows_the_samples_of_each_evaluation(page, tmp_path):
    from PIL import Image
    log = tmp_path / "logs" / "demo" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    lines = [dict(step=k, tokens=8 * k, loss=5.0 - k / 10, lr=1e-3, grad_norm=1.0, ms=10.0) for k in range(20)]
    lines += [dict(step=k, tokens=8 * k, samples=[f"<i>step {k}</i>", "two"]) for k in (0, 10)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    at = page()
    at.session_state["tab"] = "Training"
    at.run()
    assert not at.exception and at.selectbox(key="step of logs/demo").options == ["10", "0"]
    assert "&lt;i&gt;step 10&lt;/i&gt;" in html_of(at) and "<i>" not in html_of(at)
    at.selectbox(key="step of logs/demo").select(0).run()
    assert "&lt;i&gt;step 0&lt;/i&gt;" in html_of(at)
    def draw():
        return app.draw_curves([str(log.parent)], [app.last_modified(log.parent)], "steps")[0]
    before = draw()
    assert Image.open(io.BytesIO(before)).width > 1000 and draw() == before
    with log.open("a") as f:
        f.write(json.dumps(dict(step=20, tokens=160, loss=1.0)) + "\n")
    os.utime(log, (2e9, 2e9))
    assert draw() != before
    log.write_text("")
    at.run()
    assert not at.exception and "holds no losses yet" in at.code[0].value


def test_help_is_nothing_but_help(run):
    rc, out, err = run("app.py", "--help")
    assert rc == 0 and "--checkpoint TEXT" in out and not err
