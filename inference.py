"""Write text with any checkpoint.

    python inference.py --prompt "Hello, I'm a language model," --num_seq 3
    python inference.py --checkpoint gpt2 --prompt "Once" --prompt "Twice" --max_tokens 100 --temperature 0
    python inference.py --stream < story.txt
    python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors."
    python inference.py                            # on a terminal: a prompt per line, Ctrl-D ends

Without --checkpoint it takes the model written last below logs/.
"""
import contextlib
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from exactgpt.config import DeviceConfig, UserError, flag, parse_config, run_script
from exactgpt.device import DTYPES, choose_compile, choose_device, choose_dtype, probe_hardware
from exactgpt.generation import alpaca_prompt, last, make_decoder, stream
from exactgpt.open_model import newest_model, open_model


@dataclass(kw_only=True)
class InferenceConfig(DeviceConfig):
    """Every flag of this script."""
    prompt: list[str] = flag([], "text to continue; may be given several times (default: standard input, a prompt a "
                             "line at a terminal)", group="text", repeat=True)
    prompt_file: list[str] = flag([], "a file whose text is a prompt; may be given several times", group="text",
                                  repeat=True)
    instruction: str = flag("", "for an instruction-tuned checkpoint: what it is to do", group="text")
    input: str = flag("", "what the instruction is about", group="text")
    num_seq: int = flag(5, "continuations of each prompt", group="text", low=1)
    max_tokens: int = flag(50, "tokens to write after the prompt", group="text", low=1)
    stop: list[str] = flag([], "end a continuation before this text; may be given several times", group="text",
                           repeat=True)
    stream: bool = flag(False, "show the text as it is written", group="text")
    checkpoint: str = flag("", "model_XXXXX.pt, a LoRA adapter, a Hugging Face folder or a name such as gpt2 "
                               "(default: the newest below logs/)", group="model")
    temperature: float = flag(1.0, "0 takes the likeliest token, larger is wilder", group="sampling", low=0.0)
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: all", group="sampling", low=0)
    top_p: float = flag(1.0, "and among those of this share of the probability", group="sampling", above=0, high=1)
    seed: int = flag(42, "same seed, same text", group="sampling", low=0)
    compile: str = flag("auto", "auto: CUDA graphs on a GPU, packed weights on a CPU; on: torch.compile, which takes "
                                "up to a minute to start; off: neither", group="system", choices=("auto", "on", "off"))

    def check(self):
        """Raise UserError for flags that contradict each other."""
        if self.input and not self.instruction:
            raise UserError("--input belongs to an --instruction; text to continue is a --prompt")
        if self.instruction and (self.prompt or self.prompt_file):
            raise UserError("--instruction and --prompt exclude each other: the instruction becomes the prompt")
        if "" in self.stop:
            raise UserError("--stop needs a text: every continuation ends before an empty one")


def main(argv=None):
    """Write as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(InferenceConfig, argv, __doc__.splitlines()[0])
    with contextlib.suppress(AttributeError):              # a test's or a notebook's stream
        sys.stdout.reconfigure(errors="replace")           # a terminal that lacks a letter shows "?"
    prompts = collect_prompts(config)
    opened = open_model(config.checkpoint or newest_model(), tokenizer=config.tokenizer).with_tokenizer()
    decoder = ready(opened, config)
    try:
        if prompts is None:
            converse(decoder, opened.tokenizer, config)
        else:
            write(decoder, opened.tokenizer, prompts, config, config.seed)
    except (RuntimeError, MemoryError) as error:
        words = "out of memory", "can't allocate memory"        # CUDA's, a CPU's
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in words):
            raise
        raise UserError("out of memory: try a smaller --num_seq or --max_tokens, or fewer prompts") from error


def collect_prompts(config):
    """The prompts that flags, files or a pipe give; None: ask for them on the terminal. Raises UserError."""
    if config.instruction:
        return [alpaca_prompt(config.instruction, config.input)]
    prompts = [*config.prompt, *map(read_prompt, config.prompt_file)]
    if prompts:
        return prompts
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    text = read_prompt(None)
    if not text:
        raise UserError('nothing to continue: give --prompt "text", or run it on a terminal')
    return [text]


def read_prompt(path):
    """The text of a file (None: of standard input) without its last line end. Raises UserError."""
    name = path or "standard input"
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read() if sys.stdin else b""
        return data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (at byte {error.start})") from error


def ready(opened, config):
    """The Decoder of an opened model on the device and in the dtype that the flags ask for. Raises UserError."""
    device = choose_device(config.device)
    hardware = probe_hardware(device)
    dtype = choose_dtype(config.dtype, hardware)
    if config.compile == "on":
        choose_compile("on", hardware, device)             # raises UserError where no compiler is
    print(f"{opened.summary()}, on {device} in {dtype}", file=sys.stderr)
    return make_decoder(opened.model, device, DTYPES[dtype], config.compile)


def converse(decoder, tokenizer, config):
    """A prompt per line until Ctrl-D; Ctrl-C ends a text that is being written."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print("A prompt per line; Ctrl-D ends.", file=sys.stderr)
    config.stream = True
    for number in itertools.count():
        try:
            prompt = input("prompt: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if prompt:
                write(decoder, tokenizer, [prompt], config, (config.seed, number))   # asked again, it writes anew
        except KeyboardInterrupt:
            print()


def write(decoder, tokenizer, prompts, config, seed):
    """Continue each prompt num_seq times; print the texts, and how fast they came."""
    block_size = decoder.model.config.block_size
    for prompt in prompts:
        n = len(tokenizer.encode(prompt))
        if n > block_size:
            print(f"a prompt has {n:,} tokens, the model reads {block_size:,}: its beginning is left out",
                  file=sys.stderr)
    begin = time.perf_counter()
    repeated = [p for p in prompts for _ in range(config.num_seq)]
    steps = stream(decoder, tokenizer, repeated, max_tokens=config.max_tokens, stop=config.stop, seed=seed,
                   temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    shown = [""] * len(repeated) if config.instruction else repeated
    if config.stream:
        rows = show_live(shown, steps)
    else:
        rows = last(tqdm(steps, "writing", config.max_tokens, unit="step", leave=False, disable=None))
        for prompt, row in zip(shown, rows):
            print(f"> {prompt}{row.text}")
    sys.stdout.flush()
    n_tokens, seconds = sum(row.n_tokens for row in rows), time.perf_counter() - begin
    print(f"{n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def show_live(prompts, steps):
    """Print rows that grow side by side, one below the other: the first as it is written, each later in its turn."""
    turn, shown = 0, None
    for rows in steps:
        while turn < len(rows):
            if shown is None:
                print(f"> {prompts[turn]}", end="")
                shown = 0
            print(rows[turn].text[shown:], end="", flush=True)
            shown = len(rows[turn].text)
            if not rows[turn].ended:
                break
            print()
            turn, shown = turn + 1, None
    return rows


if __name__ == "__main__":
    run_script(main)
