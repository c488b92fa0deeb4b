"""A Streamlit page that generates text live and shows the curves of training runs.

    streamlit run app.py                                   # the models and runs below logs/
    streamlit run app.py -- --checkpoint gpt2 --device cpu

The server listens on localhost only. Visitors can choose only the listed models: --checkpoint, those below --log_dir
and OpenAI's four sizes. Text from visitors and models is always escaped, never rendered as markup.
"""
import contextlib
import gc
import html
import io
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import streamlit as st
import torch

from exactgpt.config import DeviceConfig, UserError, find_visible, flag, human_count, parse_config, run_script
from exactgpt.device import DTYPES, choose_device, choose_dtype, probe_hardware
from exactgpt.figures import COLOURS, X_LABELS, draw_runs, read_run, read_samples
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
INSTRUCTIONS = {"Train a small GPT-2 on this machine in a few minutes:": "make demo",
                "Train one on your own text:": "python prepare_text.py mybook.txt --out data/mybook\n"
                                               "python train.py --data_dir data/mybook --log_dir logs/mybook",
                "Use OpenAI's GPT-2 from the Hugging Face hub:": "streamlit run app.py -- --checkpoint gpt2"}
STYLE = """<style>
.stMainBlockContainer {padding-top: 2.5rem;}
.gpt-facts {display: flex; flex-wrap: wrap; gap: .5rem 2.4rem; margin: .2rem 0 .6rem 0;}
.gpt-facts div {color: #6f6f6f; font-size: .85rem;}
.gpt-facts b {display: block; color: #222; font-size: 1.25rem; font-weight: 600;}
.gpt-cards {display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));}
.gpt-card {border: 1px solid #e3e6ea; border-radius: .6rem; padding: .9rem 1rem; background: #fff; line-height: 1.5;
           white-space: pre-wrap; overflow-wrap: anywhere;}
.gpt-card .prompt {color: #8a919b;}
.gpt-card .caret {color: #0072B2;}
.gpt-note {color: #6f6f6f; font-size: .85rem; margin: .1rem 0 .7rem 0;}
.gpt-next {display: grid; grid-template-columns: minmax(5rem, max-content) 1fr 3.4rem; gap: .28rem .7rem;
           align-items: center; font-size: .9rem;}
.gpt-next .token {font-family: monospace; background: #f0f3f6; border-radius: .3rem; padding: 0 .4rem; white-space: pre;
                  justify-self: end; max-width: 11rem; overflow: hidden; text-overflow: ellipsis;}
.gpt-next .bar {height: .85rem; border-radius: .25rem; background: #0072B2; min-width: 2px;}
.gpt-next .probability {color: #6f6f6f; text-align: right; font-variant-numeric: tabular-nums;}
</style>"""


@dataclass(kw_only=True)
class PageConfig(DeviceConfig):
    """The command-line flags, given after `--`."""
    log_dir: str = flag("logs", "folder with the runs and models to show", group="page")
    checkpoint: str = flag("", "model to list first: a file, a Hugging Face folder or a hub name", group="page")


def main():
    """Show the page; Streamlit runs this again after every click. Raises UserError without Streamlit."""
    if not st.runtime.exists():
        parse_config(PageConfig)        # --help
        raise UserError("this is a Streamlit page; start it with: streamlit run app.py")
    st.set_page_config("GPT-2", ":material/edit_note:", layout="wide")
    st.html(STYLE)
    try:
        config = parse_config(PageConfig)
    except UserError as error:
        show_error(error)
        return
    models = find_models(config)
    with st.sidebar:
        st.title("GPT-2")
        options = list(models)
        label = st.selectbox("Model", options, index=0 if models[options[0]] == options[0] else None,
                             placeholder="choose a model", key="model")
        settings = show_settings()
    source = models.get(label)          # None for a label that is not in the list: a browser may send anything
    writing, training = st.tabs(["Write", "Training"], key="tab", on_change="rerun")
    if writing.open:
        with writing:
            try:
                show_write_tab(source, settings, config)
            except (UserError, torch.OutOfMemoryError, MemoryError) as error:
                show_error(error)
    if training.open:
        with training:
            show_training_tab(config.log_dir)


def find_models(config):
    """Return {label: source} of all models on offer: --checkpoint, those below log_dir (newest first), the hub's."""
    found = [p for p in find_visible(config.log_dir, "model_*.pt") if p.is_file()]
    found += [p.parent for p in find_visible(config.log_dir, "config.json")
              if any(p.parent.glob("*.safetensors")) or (p.parent / "pytorch_model.bin").exists()]
    found = [str(p) for p in sorted(found, key=last_modified, reverse=True)]
    hub_names = [name for name in GPT2_SIZES if name != config.checkpoint]
    first = [config.checkpoint] if config.checkpoint else []
    return {**{source: source for source in [*first, *found]}, **{f"{name} (from the hub)": name for name in hub_names}}


def last_modified(source):
    """Return the modification time of a file, or of the newest file in a folder; 0 for a hub name."""
    with contextlib.suppress(OSError):      # training may delete the checkpoint
        path = Path(source)
        return max(p.stat().st_mtime for p in (path, *(path.iterdir() if path.is_dir() else ())))
    return 0.0


# -----------------------------------------------------------------------------
# the model in memory

@dataclass
class LoadedModel:
    """A model ready to generate."""
    decoder: object
    tokenizer: object
    facts: dict          # {name: text}, shown above the prompt


class GenerationSlot:
    """The one model in memory, and the lock under which one visitor at a time uses it."""

    def __init__(self):
        self.lock = threading.Lock()
        self._key, self._loaded = None, None

    @contextlib.contextmanager
    def acquire(self, source, config, on_wait=lambda: None):
        """Lock the slot and yield the LoadedModel; load it first if the source, its file, device or dtype changed.

        on_wait() is called repeatedly while another visitor holds the slot. Raises UserError if the model cannot be
        opened.
        """
        while not self.lock.acquire(timeout=0.2):
            on_wait()
        try:
            key = source, last_modified(source), config.device, config.dtype
            if key != self._key:
                self._key, self._loaded = None, None
                gc.collect()                         # free the old model before loading the new one
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._loaded = load_model(source, config)
                self._key = key
            yield self._loaded
        finally:
            self.lock.release()


@st.cache_resource(show_spinner=False)
def shared_slot():
    """Return the GenerationSlot that all visitors share."""
    return GenerationSlot()


def load_model(source, config):
    """Open a model and prepare it for generation. Raises UserError."""
    opened = open_model(source, tokenizer=config.tokenizer).with_tokenizer()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, probe_hardware(device))
    c = opened.model.config
    facts = {"Parameters": human_count(opened.model.n_params()),
             "Step": "-" if opened.step is None else f"{opened.step:,}",
             "Validation loss": "-" if opened.val_loss is None else f"{opened.val_loss:.4f}",
             "Layers, heads, channels": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
             "Window": f"{c.block_size:,} tokens", "Runs on": f"{device}, {dtype}"}
    return LoadedModel(make_decoder(opened.model, device, DTYPES[dtype]), opened.tokenizer, facts)


# -----------------------------------------------------------------------------
# the Write tab

@dataclass
class Settings:
    """The sampling settings of the sidebar."""
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    n_samples: int
    seed: int


@dataclass
class Generated:
    """The texts generated so far for a prompt."""
    source: str = ""
    prompt: str = ""
    texts: list = field(default_factory=list)       # continuations, without the prompt
    n_tokens: int = 0
    seconds: float = 0.0


def show_settings():
    """Show the sampling settings and return them, with the expensive ones clamped: a browser may send any value."""
    return Settings(
        temperature=st.slider("Temperature", 0.0, 2.0, 0.8, 0.05,
                              help="Higher is more random. 0: always the likeliest token."),
        top_k=st.slider("Top-k", 0, 200, 50, help="Sample from the k likeliest tokens. 0: all."),
        top_p=st.slider("Top-p", 0.05, 1.0, 1.0, 0.05, help="Nucleus sampling: probability mass to keep. 1: off."),
        max_tokens=min(st.slider("Maximum length", 1, MAX_TOKENS, 120, help="New tokens per sample."), MAX_TOKENS),
        n_samples=min(st.slider("Samples side by side", 1, MAX_SAMPLES, 2), MAX_SAMPLES),
        seed=int(st.number_input("Seed", 0, 2**31, 42, help="The same seed and settings give the same text.")))


def show_write_tab(source, settings, config):
    """Show the model's facts, the prompt, the likeliest next tokens and the generated texts."""
    if source is None:
        show_instructions()
        return
    state = st.session_state
    show_model_facts(source, config)
    left, right = st.columns([8, 5], gap="large")
    with left:
        prompt = st.text_area("Prompt", "Return a new", height=140, max_chars=MAX_PROMPT, key="prompt")[:MAX_PROMPT]
        write, stop, _ = st.columns([1, 1, 3])
        start = write.button("Write", type="primary", width="stretch", key="write")
        stop.button("Stop", width="stretch", key="stop", disabled=not start)      # any click aborts this run of main()
        note, cards = st.empty(), st.empty()
    if start:
        state.generated = Generated(source, prompt)
    generated = state.setdefault("generated", Generated())
    show_texts(note, cards, generated)
    with right:
        show_next_tokens(source, config, prompt, generated)
    if start:
        on_wait = lambda: note.info("Another visitor is generating; you are next.")
        with shared_slot().acquire(source, config, on_wait) as loaded:
            generate_texts(loaded, generated, settings, lambda: show_texts(note, cards, generated, caret=CARET))
        st.rerun()


def show_model_facts(source, config):
    """Show the facts of a model, which is loaded if this visitor has not seen it yet."""
    state, key, note = st.session_state, (source, last_modified(source)), st.empty()
    if state.get("facts", (None,))[0] != key:
        note.info("Loading the model ...")
        with shared_slot().acquire(source, config, lambda: note.info("Waiting for another visitor ...")) as loaded:
            state.facts = key, loaded.facts
        note.empty()
    st.html('<div class="gpt-facts">' + "".join(
        f"<div>{name}<b>{html.escape(value)}</b></div>" for name, value in state.facts[1].items()) + "</div>")


def generate_texts(loaded, generated, settings, show):
    """Generate into `generated`, calling show() now and then; Streamlit aborts inside show() on a click."""
    options = asdict(settings)
    prompts = [generated.prompt] * options.pop("n_samples")
    begin, last_shown = time.perf_counter(), 0.0
    for continuations in stream(loaded.decoder, loaded.tokenizer, prompts, **options):
        generated.texts = [c.text for c in continuations]
        generated.n_tokens = sum(c.n_tokens for c in continuations)
        generated.seconds = time.perf_counter() - begin
        if generated.seconds - last_shown > FRAME_S:
            last_shown = generated.seconds
            show()


def show_texts(note, cards, generated, caret=""):
    """Show the speed in `note`, and prompt and continuation of each sample side by side in `cards`."""
    if not generated.texts:
        return
    note.html(f'<div class="gpt-note">{html.escape(generated.source)}: {generated.n_tokens:,} tokens in '
              f"{generated.seconds:.1f} s, {generated.n_tokens / generated.seconds:.1f} tokens/s</div>")
    prompt = generated.prompt
    prompt = html.escape(prompt if len(prompt) <= 600 else "\u2026" + prompt[-600:])
    cards.html('<div class="gpt-cards">' + "".join(
        f'<div class="gpt-card"><span class="prompt">{prompt}</span>{html.escape(text)}{caret}</div>'
        for text in generated.texts) + "</div>")


def show_next_tokens(source, config, prompt, generated):
    """Show the ten likeliest next tokens after the prompt or a generated text, as bars."""
    choices = {"the prompt": prompt, **{f"text {i + 1}": generated.prompt + t for i, t in enumerate(generated.texts)}}
    after = st.segmented_control("Likeliest next tokens after", list(choices), default="the prompt", key="after")
    text = choices.get(after, prompt)
    state, note = st.session_state, st.empty()
    key = source, last_modified(source), text
    if state.get("next_tokens", (None,))[0] != key:
        with shared_slot().acquire(source, config, lambda: note.info("Waiting for another visitor ...")) as loaded:
            ids = loaded.tokenizer.encode(text) or [loaded.tokenizer.eot]
            likeliest = top_next_tokens(loaded.decoder.model, ids, loaded.tokenizer.n_vocab)
            state.next_tokens = key, [(printable_token(loaded.tokenizer, i), p) for i, p in likeliest]
        note.empty()
    bars = state.next_tokens[1]
    st.html('<div class="gpt-next">' + "".join(
        f'<span class="token">{html.escape(name)}</span><span><div class="bar" style="width: {p / bars[0][1]:.1%}">'
        f'</div></span><span class="probability">{p:.1%}</span>' for name, p in bars) + "</div>")


def printable_token(tokenizer, token):
    """Return a token as readable text: symbols for white space, hexadecimal bytes for an incomplete character."""
    if token == tokenizer.eot:
        return "end of text"
    data = tokenizer.decode_bytes([token])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02x}" for byte in data)
    return "".join(WHITESPACE_SYMBOLS.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def show_instructions():
    """Show how to get a model."""
    st.header("No model selected")
    for text, command in INSTRUCTIONS.items():
        st.write(text)
        st.code(command, language="bash")
    st.write("Then reload this page. Or choose an OpenAI model on the left; it is downloaded from the hub.")


def show_error(error):
    """Show an error message as plain text."""
    st.error("Error")
    st.code(str(error) or type(error).__name__, language=None, wrap_lines=True)


# -----------------------------------------------------------------------------
# the Training tab

def show_training_tab(log_dir):
    """Show curves and samples of the chosen runs, updated while they train."""
    runs = find_runs(log_dir)
    if not runs:
        st.info("No training runs yet. Start one with:")
        st.code("make demo", language="bash")
        return
    left, right = st.columns([3, 1])
    names = left.multiselect("Runs", list(runs), default=list(runs)[:1], max_selections=len(COLOURS), key="runs")
    x = right.segmented_control("X axis", list(X_LABELS), default="steps", key="x")
    names = [name for name in names if name in runs] or list(runs)[:1]
    show_runs({name: str(runs[name]) for name in names}, x if x in X_LABELS else "steps")


def find_runs(log_dir):
    """Return {name: log file} of the runs below log_dir, the most recently written first."""
    root = Path(log_dir)
    logs = {p.parent: p for name in ("log.txt", "metrics.jsonl") for p in find_visible(root, name)}
    logs = sorted(logs.values(), key=last_modified, reverse=True)
    return {str(p.parent.relative_to(root)) if p.parent != root else str(root): p for p in logs}


@st.fragment(run_every=REFRESH_S)
def show_runs(logs, x):
    """Show curves and samples of the runs {name: log file}; Streamlit reruns only this part every REFRESH_S seconds."""
    try:
        st.image(draw_curves(logs, [last_modified(log) for log in logs.values()], x), width="stretch")
    except UserError as error:
        show_error(error)
    for name, log in logs.items():
        samples = read_samples(Path(log).parent)
        if samples:
            step = st.selectbox(f"Samples of {name} at step", sorted(samples, reverse=True), key=f"step of {name}")
            st.html('<div class="gpt-cards">' + "".join(
                f'<div class="gpt-card">{html.escape(text)}</div>' for text in samples.get(step, [])) + "</div>")


@st.cache_data(max_entries=16, show_spinner=False)
def draw_curves(logs, modified, x):
    """Draw the curves of the runs {name: log file} as a PNG (bytes). modified: file times, part of the cache's key."""
    runs = [replace(read_run(Path(log).parent), name=name) for name, log in logs.items()]
    data = io.BytesIO()
    draw_runs(runs, x).savefig(data, format="png")
    return data.getvalue()


if __name__ == "__main__":
    run_script(main)
