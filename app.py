"""A Streamlit page that generates text live and shows the curves of training runs.

    streamlit run app.py                                   # the models and runs below logs/
    streamlit run app.py -- --checkpoint gpt2 --device cpu

The server listens on localhost only. Visitors can choose only the listed models: --checkpoint, those below --log_dir
and OpenAI's four sizes. Text from visitors and models is always escaped, never rendered as markup.
"""
import exactgpt.launch  # noqa: F401  first, see there

import contextlib
import gc
import html
import io
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import streamlit as st
import torch

from exactgpt.config import DeviceConfig, UserError, counted, flag, human_count, parse_config, run_script
from exactgpt.device import DTYPES, choose_device, choose_dtype, probe_hardware
from exactgpt.figures import COLOURS, X_LABELS, draw_runs, read_run
from exactgpt.files import find_visible
from exactgpt.generation import make_decoder, stream, top_next_tokens
from exactgpt.open_model import open_model
from model import GPT2_SIZES

MAX_PROMPT = 4000        # characters
MAX_SAMPLES = 4
MAX_TOKENS = 1000
FRAME_S = 0.05           # between two redraws of a growing text
REFRESH_S = 5            # between two reads of the logs
CARET = '<span class="caret">\u258c</span>'
WHITESPACE_SYMBOLS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}
MAKE_ONE = """make demo                                             # a small GPT-2, in a few minutes
python prepare_text.py README.md --out data/readme    # or one of your own text: it says how to train on that"""
STYLE = """<style>
.stMainBlockContainer {padding-top: 2.5rem;}
.gpt-cards {display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));}
.gpt-card {border: 1px solid #e3e6ea; border-radius: .6rem; padding: .9rem 1rem; background: #fff; line-height: 1.5;
           white-space: pre-wrap; overflow-wrap: anywhere;}
.gpt-card .prompt {color: #8a919b;}
.gpt-card .caret {color: #0072B2;}
.gpt-note {color: #6f6f6f; font-size: .85rem; margin: .1rem 0 .7rem 0;}
</style>"""


@dataclass(kw_only=True)
class PageConfig(DeviceConfig):
    """The command-line flags, given after `--`."""
    log_dir: str = flag("logs", "folder with the runs and models to show", group="page")
    checkpoint: str = flag("", "model to list first: a file, a Hugging Face folder or a hub name")


def main():
    """Show the page; Streamlit runs this again after every click. Raises UserError without Streamlit."""
    if not st.runtime.exists():
        parse_config(PageConfig)        # --help
        raise UserError("this is a Streamlit page; start it with: streamlit run app.py")
    st.set_page_config("GPT-2", ":material/edit_note:", layout="wide")
    st.html(STYLE)
    try:
        config = parse_config(PageConfig)
        models = find_models(config)
        with st.sidebar:
            source, settings = show_sidebar(models, config)
        writing, training = st.tabs(["Write", "Training"], key="tab", on_change="rerun")
        with writing:
            if writing.open and source in models:      # a browser may send any text as its choice
                show_write_tab(source, settings, config)
            elif writing.open:
                st.header("No model selected")
                st.write("Choose one on the left: OpenAI's are on the hub. Or make one, and reload this page:")
                st.code(MAKE_ONE, language="bash")
        with training:
            if training.open:
                show_training_tab(config.log_dir)
    except (UserError, torch.OutOfMemoryError, MemoryError) as error:
        st.error("Error")
        st.code(str(error) or type(error).__name__, language=None, wrap_lines=True)     # plain text, not markup


def show_sidebar(models, config):
    """Show the list of models and the sampling settings; return the chosen model and the settings."""
    st.title("GPT-2")
    source = st.selectbox("Model", models, index=None if models[0] in GPT2_SIZES and not config.checkpoint else 0,
                          format_func=lambda source: f"{source} (from the hub)" if source in GPT2_SIZES else source,
                          placeholder="choose a model", key="model")
    return source, dict(      # the expensive settings are clamped: a browser may send any number
        temperature=st.slider("Temperature", 0.0, 2.0, 0.8, 0.05,
                              help="Higher is more random. 0: always the likeliest token."),
        top_k=st.slider("Top-k", 0, 200, 50, help="Sample from the k likeliest tokens. 0: all."),
        top_p=st.slider("Top-p", 0.05, 1.0, 1.0, 0.05, help="Nucleus sampling: probability mass to keep. 1: off."),
        max_tokens=min(st.slider("Maximum length", 1, MAX_TOKENS, 120, help="New tokens per sample."), MAX_TOKENS),
        n_samples=min(st.slider("Samples side by side", 1, MAX_SAMPLES, 2), MAX_SAMPLES),
        seed=int(st.number_input("Seed", 0, 2**31, 42, help="The same seed and settings give the same text.")))


def find_models(config):
    """Return the sources of all models on offer: --checkpoint, those below log_dir (newest first), the hub's."""
    found = [p for p in find_visible(config.log_dir, "model_*.pt") if p.is_file()]
    found += [p.parent for p in find_visible(config.log_dir, "config.json")
              if any(p.parent.glob("*.safetensors")) or (p.parent / "pytorch_model.bin").exists()]
    found = [str(p) for p in sorted(found, key=last_modified, reverse=True)]
    return list(dict.fromkeys(filter(None, [config.checkpoint, *found, *GPT2_SIZES])))


def last_modified(source):
    """Return the modification time of a file, or of the newest file in a folder; 0 for a hub name."""
    with contextlib.suppress(OSError):      # training may delete the checkpoint
        return max(path.stat().st_mtime for path in (Path(source), *Path(source).glob("*")))
    return 0.0


# ---- the model in memory -----------------------------------------------------

@st.cache_resource(show_spinner=False)
def shared():
    """Return what all visitors share: the lock under which one at a time uses the model, and {key: model}."""
    return threading.Lock(), {}


@contextlib.contextmanager
def locked_model(source, config, on_wait=lambda: None):
    """Lock the model, loaded first if it or its file is new; yield (decoder, tokenizer, facts). Raises UserError."""
    lock, models = shared()
    while not lock.acquire(timeout=0.2):         # another visitor holds it
        on_wait()
    try:
        key = source, last_modified(source)
        if key not in models:
            models.clear()
            gc.collect()                         # free the old model before loading the new one
            torch.cuda.empty_cache()
            opened = open_model(source, tokenizer=config.tokenizer).with_tokenizer()
            device = choose_device(config.device)
            dtype = choose_dtype(config.dtype, probe_hardware(device))
            c = opened.model.config
            facts = {"Parameters": human_count(opened.model.n_params()),
                     "Step": "-" if opened.step is None else f"{opened.step:,}",
                     "Validation loss": "-" if opened.val_loss is None else f"{opened.val_loss:.4f}",
                     "Layers, heads, channels": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
                     "Window": counted(c.block_size, "token"), "Runs on": f"{device}, {dtype}"}
            models[key] = make_decoder(opened.model, device, DTYPES[dtype]), opened.tokenizer, facts
        yield models[key]
    finally:
        lock.release()


@st.cache_resource(max_entries=100, show_spinner="Loading the model, or waiting for another visitor ...")
def look_up(source, modified, text, _config):
    """Return a model's facts and a table of its ten likeliest next tokens after a text, {column: list}."""
    with locked_model(source, _config) as (decoder, tokenizer, facts):
        likeliest = top_next_tokens(decoder.model, tokenizer.encode(text) or [tokenizer.start], tokenizer.n_vocab)
    return facts, {"Token": [printable_token(tokenizer, token) for token, _ in likeliest],
                   "Probability": [p for _, p in likeliest]}


# ---- the Write tab -----------------------------------------------------------

def show_write_tab(source, settings, config):
    """Show the model's facts, the prompt, the likeliest next tokens and the generated texts."""
    modified = last_modified(source)
    facts, _ = look_up(source, modified, "", config)
    with st.container(horizontal=True, gap="large"):
        for name, value in facts.items():
            st.metric(name, value, width="content")
    left, right = st.columns([8, 5], gap="large")
    with left:
        prompt = st.text_area("Prompt", "Return a new", height=140, max_chars=MAX_PROMPT, key="prompt")[:MAX_PROMPT]
        write, stop, _ = st.columns([1, 1, 3])
        start = write.button("Write", type="primary", width="stretch", key="write")
        stop.button("Stop", width="stretch", key="stop", disabled=not start)      # any click aborts this run of main()
        place = st.empty()
    if start or "generated" not in st.session_state:
        # texts: continuations, without the prompt
        st.session_state.generated = SimpleNamespace(source=source, prompt=prompt, texts=[], n_tokens=0, seconds=0.0)
    generated = st.session_state.generated
    show_texts(place, generated)
    with right:
        choices = {"the prompt": prompt, **{f"text {i}": generated.prompt + text
                                            for i, text in enumerate(generated.texts, start=1)}}
        after = st.segmented_control("Likeliest next tokens after", list(choices), default="the prompt", key="after")
        _, table = look_up(source, modified, choices.get(after, prompt), config)
        bars = st.column_config.ProgressColumn(format="percent", max_value=table["Probability"][0])
        st.dataframe(table, row_height=30, column_config={"Probability": bars})
    if not start:
        return
    prompts = [prompt] * settings.pop("n_samples")
    on_wait = lambda: place.info("Another visitor is generating; you are next.")
    with locked_model(source, config, on_wait) as (decoder, tokenizer, _):
        begin, last_shown = time.perf_counter(), 0.0
        for continuations in stream(decoder, tokenizer, prompts, **settings):
            generated.texts = [c.text for c in continuations]
            generated.n_tokens = sum(c.n_tokens for c in continuations)
            generated.seconds = time.perf_counter() - begin
            if generated.seconds - last_shown > FRAME_S:
                last_shown = generated.seconds
                show_texts(place, generated, CARET)      # a click aborts the run in here
    st.rerun()


def show_texts(place, generated, caret=""):
    """Show in `place` the speed, and below it prompt and continuation of each sample side by side."""
    if generated.texts:
        prompt = html.escape(generated.prompt if len(generated.prompt) <= 600 else "\u2026" + generated.prompt[-600:])
        speed = generated.n_tokens / generated.seconds
        note = (f"{generated.source}: {counted(generated.n_tokens, 'token')} in {generated.seconds:.1f} s, "
                f"{speed:.1f} tokens/s")
        place.html(f'<div class="gpt-note">{html.escape(note)}</div><div class="gpt-cards">' + "".join(
            f'<div class="gpt-card"><span class="prompt">{prompt}</span>{html.escape(text)}{caret}</div>'
            for text in generated.texts) + "</div>")


def printable_token(tokenizer, token):
    """Return a token as readable text: symbols for white space, codes for what is not printable or half a character."""
    if token == tokenizer.eot:
        return "end of text"
    text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    return "".join(WHITESPACE_SYMBOLS.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)


# ---- the Training tab --------------------------------------------------------

def show_training_tab(log_dir):
    """Show curves and samples of the chosen runs, updated while they train."""
    runs = {str(path.parent) for name in ("log.txt", "metrics.jsonl") for path in find_visible(log_dir, name)}
    if not runs:
        st.info("No training runs yet. Start one with `make demo`.")
        return
    runs = sorted(runs, key=last_modified, reverse=True)
    left, right = st.columns([3, 1])
    chosen = left.multiselect("Runs", runs, default=runs[:1], max_selections=len(COLOURS), key="runs")
    x = right.segmented_control("X axis", list(X_LABELS), default="steps", key="x")
    show_runs([run for run in chosen if run in runs] or runs[:1], x if x in X_LABELS else "steps")


@st.fragment(run_every=REFRESH_S)
def show_runs(folders, x):
    """Show curves and samples of the runs in these folders; Streamlit reruns only this part every REFRESH_S seconds."""
    try:
        picture, samples = draw_curves(folders, [last_modified(folder) for folder in folders], x)
    except UserError as error:
        st.code(str(error), language=None, wrap_lines=True)
        return
    st.image(picture, width="stretch")
    for folder, texts in zip(folders, samples):
        if texts:
            step = st.selectbox(f"Samples of {folder} at step", sorted(texts, reverse=True), key=f"step of {folder}")
            st.html('<div class="gpt-cards">' + "".join(
                f'<div class="gpt-card">{html.escape(text)}</div>' for text in texts.get(step, [])) + "</div>")


@st.cache_resource(max_entries=16, show_spinner=False)
def draw_curves(folders, modified, x):
    """Return the curves of runs as a PNG (bytes), and each one's {step: texts}. modified: part of the cache's key."""
    runs = [replace(read_run(folder), name=folder) for folder in folders]
    data = io.BytesIO()
    draw_runs(runs, x).savefig(data, format="png")
    return data.getvalue(), [run.samples for run in runs]


if __name__ == "__main__":
    run_script(main)
