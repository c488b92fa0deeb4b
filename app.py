"""A page that writes as you watch, and shows what training does.

    streamlit run app.py                                   # the models and runs below logs/
    streamlit run app.py -- --checkpoint gpt2 --device cpu

It listens to this machine only. A visitor chooses among the models that it found below --log_dir, --checkpoint and
OpenAI's sizes, and can name no other file; what visitors and models write is shown as text, never as markup.
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
from exactgpt.generation import likeliest_next, make_decoder, stream
from exactgpt.open_model import open_model
from model import GPT2_SIZES

MAX_PROMPT = 4000        # characters
MAX_SAMPLES = 4
MAX_TOKENS = 1000
FRAME_S = 0.05           # between two pictures of a text that grows
REFRESH_S = 5            # between two looks at the log of a run
CARET = '<span class="caret">\u258c</span>'
SIGNS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}
HOW_TO = {"A small GPT-2, trained on this machine in minutes:": "make demo",
          "One on your own text:": "python prepare_text.py mybook.txt --out data/mybook\n"
                                   "python train.py --data_dir data/mybook --log_dir logs/mybook",
          "OpenAI's, from the hub:": "streamlit run app.py -- --checkpoint gpt2"}
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
.gpt-next .share {color: #6f6f6f; text-align: right; font-variant-numeric: tabular-nums;}
</style>"""


@dataclass(kw_only=True)
class PageConfig(DeviceConfig):
    """The flags of the page, after `--`."""
    log_dir: str = flag("logs", "folder whose runs and models the page shows", group="page")
    checkpoint: str = flag("", "a model to offer first: a file, a Hugging Face folder or a name", group="page")


def main():
    """The page, from top to bottom: Streamlit runs it again after every click.

    Raises UserError where it is run without Streamlit.
    """
    if not st.runtime.exists():
        parse_config(PageConfig)        # --help
        raise UserError("this is a page, start it with: streamlit run app.py")
    st.set_page_config("GPT-2", ":material/edit_note:", layout="wide")
    st.html(STYLE)
    try:
        config = parse_config(PageConfig)
    except UserError as error:
        show_problem(error)
        return
    models = find_models(config)
    with st.sidebar:
        st.title("GPT-2")
        options = list(models)
        label = st.selectbox("Model", options, index=0 if models[options[0]] == options[0] else None,
                             placeholder="choose a model", key="model")
        settings = ask_settings()
    source = models.get(label)          # a label that we did not offer names nothing
    writing, training = st.tabs(["Write", "Training"], key="tab", on_change="rerun")
    if writing.open:
        with writing:
            try:
                show_writing(source, settings, config)
            except (UserError, torch.OutOfMemoryError, MemoryError) as error:
                show_problem(error)
    if training.open:
        with training:
            show_training(config.log_dir)


def find_models(config):
    """{label: source} of what a visitor may choose: --checkpoint, what lies below log_dir (newest first), hub names."""
    found = [p for p in find_visible(config.log_dir, "model_*.pt") if p.is_file()]
    found += [p.parent for p in find_visible(config.log_dir, "config.json")
              if any(p.parent.glob("*.safetensors")) or (p.parent / "pytorch_model.bin").exists()]
    found = [str(p) for p in sorted(found, key=last_change, reverse=True)]
    named = [name for name in GPT2_SIZES if name != config.checkpoint]
    first = [config.checkpoint] if config.checkpoint else []
    return {**{source: source for source in [*first, *found]}, **{f"{name} (from the hub)": name for name in named}}


def last_change(source):
    """When a file or a folder's newest file was written; 0 for a hub name. A checkpoint may vanish meanwhile."""
    with contextlib.suppress(OSError):
        path = Path(source)
        return max(p.stat().st_mtime for p in (path, *(path.iterdir() if path.is_dir() else ())))
    return 0.0


# -----------------------------------------------------------------------------
# the model in memory

@dataclass
class Writer:
    """A model made ready, and what the page tells of it."""
    decoder: object
    tokenizer: object
    facts: dict          # name -> text


class Desk:
    """The one model in memory. Whoever uses it holds the lock: two visitors' texts cannot mix."""

    def __init__(self):
        self.lock = threading.Lock()
        self._key, self._writer = None, None

    @contextlib.contextmanager
    def writer(self, source, config, wait=lambda: None):
        """The Writer of a model, held for the `with`; read again when its file, device or dtype has changed.

        wait() is called while someone else writes. Raises UserError for a model that cannot be opened.
        """
        while not self.lock.acquire(timeout=0.2):
            wait()
        try:
            key = source, last_change(source), config.device, config.dtype
            if key != self._key:
                self._key, self._writer = None, None
                gc.collect()                         # the old one is gone before the new one needs the room
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._writer = make_writer(source, config)
                self._key = key
            yield self._writer
        finally:
            self.lock.release()


@st.cache_resource(show_spinner=False)
def the_desk():
    """The Desk that all visitors share."""
    return Desk()


def make_writer(source, config):
    """Open a model and make it ready to write. Raises UserError."""
    opened = open_model(source, tokenizer=config.tokenizer).with_tokenizer()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, probe_hardware(device))
    c = opened.model.config
    facts = {"Parameters": human_count(opened.model.n_params()),
             "Step": "-" if opened.step is None else f"{opened.step:,}",
             "Validation loss": "-" if opened.val_loss is None else f"{opened.val_loss:.4f}",
             "Layers, heads, channels": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
             "Window": f"{c.block_size:,} tokens", "Runs on": f"{device}, {dtype}"}
    return Writer(make_decoder(opened.model, device, DTYPES[dtype]), opened.tokenizer, facts)


# -----------------------------------------------------------------------------
# writing

@dataclass
class Settings:
    """What the sidebar asks for."""
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    n_samples: int
    seed: int


@dataclass
class Written:
    """The texts that a visitor sees, as far as they have grown."""
    source: str = ""
    prompt: str = ""
    texts: list = field(default_factory=list)
    n_tokens: int = 0
    seconds: float = 0.0


def ask_settings():
    """The sliders; a value that none of them can have is cut to the nearest one."""
    ask = st.slider
    return Settings(
        temperature=ask("Temperature", 0.0, 2.0, 0.8, 0.05, help="0: always the likeliest token. Larger: wilder."),
        top_k=ask("Top-k", 0, 200, 50, help="Choose among the k likeliest tokens. 0: among all."),
        top_p=ask("Top-p", 0.05, 1.0, 1.0, 0.05, help="And among those that share this much of the probability."),
        max_tokens=min(ask("Maximum length", 1, MAX_TOKENS, 120, help="Tokens after the prompt."), MAX_TOKENS),
        n_samples=min(ask("Samples side by side", 1, MAX_SAMPLES, 2), MAX_SAMPLES),
        seed=int(st.number_input("Seed", 0, 2**31, 42, help="The same seed and settings: the same text.")))


def show_writing(source, settings, config):
    """The Write tab: model card, prompt, what comes next, texts."""
    if source is None:
        show_how_to()
        return
    state = st.session_state
    show_card(source, config)
    left, right = st.columns([8, 5], gap="large")
    with left:
        prompt = st.text_area("Prompt", "Return a new", height=140, max_chars=MAX_PROMPT, key="prompt")[:MAX_PROMPT]
        write, stop, _ = st.columns([1, 1, 3])
        start = write.button("Write", type="primary", width="stretch", key="write")
        stop.button("Stop", width="stretch", key="stop", disabled=not start)      # any click ends this run of main()
        note, cards = st.empty(), st.empty()
    if start:
        state.written = Written(source, prompt)
    written = state.setdefault("written", Written())
    show_texts(note, cards, written)
    with right:
        show_next(source, config, prompt, written)
    if start:
        waiting = lambda: note.info("Another visitor is writing; your text is next.")
        with the_desk().writer(source, config, waiting) as writer:
            write_texts(writer, written, settings, lambda: show_texts(note, cards, written, caret=CARET))
        st.rerun()


def show_card(source, config):
    """The facts of the model; it is opened where this visitor has not seen them yet."""
    state, asked, waiting = st.session_state, (source, last_change(source)), st.empty()
    if state.get("card", (None,))[0] != asked:
        waiting.info("Opening the model ...")
        with the_desk().writer(source, config, lambda: waiting.info("Another visitor is writing.")) as writer:
            state.card = asked, writer.facts
        waiting.empty()
    st.html('<div class="gpt-facts">' + "".join(
        f"<div>{name}<b>{html.escape(value)}</b></div>" for name, value in state.card[1].items()) + "</div>")


def write_texts(writer, written, settings, show):
    """Let the texts grow; show() is where a click of the visitor ends it."""
    options = asdict(settings)
    prompts = [written.prompt] * options.pop("n_samples")
    begin, shown = time.perf_counter(), 0.0
    for rows in stream(writer.decoder, writer.tokenizer, prompts, **options):
        written.texts = [row.text for row in rows]
        written.n_tokens = sum(row.n_tokens for row in rows)
        written.seconds = time.perf_counter() - begin
        if written.seconds - shown > FRAME_S:
            shown = written.seconds
            show()


def show_texts(note, cards, written, caret=""):
    """Prompt and continuation of each sample side by side, and how fast they came."""
    if not written.texts:
        return
    note.html(f'<div class="gpt-note">{html.escape(written.source)}: {written.n_tokens:,} tokens in '
              f"{written.seconds:.1f} s, {written.n_tokens / written.seconds:.1f} tokens/s</div>")
    prompt = html.escape(written.prompt if len(written.prompt) <= 600 else "\u2026" + written.prompt[-600:])
    cards.html('<div class="gpt-cards">' + "".join(
        f'<div class="gpt-card"><span class="prompt">{prompt}</span>{html.escape(text)}{caret}</div>'
        for text in written.texts) + "</div>")


def show_next(source, config, prompt, written):
    """The ten likeliest next tokens after the prompt, or after a text that was written, as bars."""
    places = {"the prompt": prompt, **{f"text {i + 1}": written.prompt + t for i, t in enumerate(written.texts)}}
    after = st.segmented_control("What comes next, after", list(places), default="the prompt", key="after")
    text = places.get(after, prompt)
    state, waiting = st.session_state, st.empty()
    asked = source, last_change(source), text
    if state.get("next", (None,))[0] != asked:
        wait = lambda: waiting.info("Another visitor is writing; one moment.")
        with the_desk().writer(source, config, wait) as writer:
            ids = writer.tokenizer.encode(text) or [writer.tokenizer.eot]
            likeliest = likeliest_next(writer.decoder.model, ids, writer.tokenizer.n_vocab)
            state.next = asked, [(token_name(writer.tokenizer, i), share) for i, share in likeliest]
        waiting.empty()
    bars = state.next[1]
    st.html('<div class="gpt-next">' + "".join(
        f'<span class="token">{html.escape(name)}</span><span><div class="bar" style="width: {share / bars[0][1]:.1%}">'
        f'</div></span><span class="share">{share:.1%}</span>' for name, share in bars) + "</div>")


def token_name(tokenizer, token):
    """A token as people can read it: white space as signs, bytes that are no whole character by their number."""
    if token == tokenizer.eot:
        return "end of text"
    data = tokenizer.decode_bytes([token])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02x}" for byte in data)
    return "".join(SIGNS.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def show_how_to():
    """The page without a model."""
    st.header("There is no model yet")
    for words, command in HOW_TO.items():
        st.write(words)
        st.code(command, language="bash")
    st.write("Then reload this page; or choose one of OpenAI's at the left, which is fetched from the hub.")


def show_problem(error):
    """An error in the words of a UserError, as plain text."""
    st.error("This did not work.")
    st.code(str(error) or type(error).__name__, language=None, wrap_lines=True)


# -----------------------------------------------------------------------------
# training

def show_training(log_dir):
    """The Training tab: curves of the chosen runs, drawn again while they train, and what their models wrote."""
    runs = find_runs(log_dir)
    if not runs:
        st.info("No run has written a log yet; this starts one:")
        st.code("make demo", language="bash")
        return
    left, right = st.columns([3, 1])
    names = left.multiselect("Runs", list(runs), default=list(runs)[:1], max_selections=len(COLOURS), key="runs")
    x = right.segmented_control("Along", list(X_LABELS), default="steps", key="x")
    names = [name for name in names if name in runs] or list(runs)[:1]
    watch({name: str(runs[name]) for name in names}, x if x in X_LABELS else "steps")


def find_runs(log_dir):
    """{name: log file} of the runs below log_dir, the one that was written to last first."""
    root = Path(log_dir)
    logs = {p.parent: p for name in ("log.txt", "metrics.jsonl") for p in find_visible(root, name)}
    logs = sorted(logs.values(), key=last_change, reverse=True)
    return {str(p.parent.relative_to(root)) if p.parent != root else str(root): p for p in logs}


@st.fragment(run_every=REFRESH_S)
def watch(logs, x):
    """Curves and samples of some runs, {name: log file}; this part of the page runs by itself every few seconds."""
    try:
        st.image(picture(logs, [last_change(log) for log in logs.values()], x), width="stretch")
    except UserError as error:
        show_problem(error)
    for name, log in logs.items():
        samples = read_samples(Path(log).parent)
        if samples:
            step = st.selectbox(f"What {name} wrote at step", sorted(samples, reverse=True), key=f"step of {name}")
            st.html('<div class="gpt-cards">' + "".join(
                f'<div class="gpt-card">{html.escape(text)}</div>' for text in samples.get(step, [])) + "</div>")


@st.cache_data(max_entries=16, show_spinner=False)
def picture(logs, changes, x):
    """The curves as the bytes of a PNG; `changes`, when the logs were written, makes Streamlit draw them again."""
    runs = [replace(read_run(Path(log).parent), name=name) for name, log in logs.items()]
    data = io.BytesIO()
    draw_runs(runs, x).savefig(data, format="png")
    return data.getvalue()


if __name__ == "__main__":
    run_script(main)
