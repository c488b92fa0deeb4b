"""Generate text with any checkpoint.

    python inference.py --prompt "Hello, I'm a language model," --num_seq 3
    python inference.py --checkpoint gpt2 --prompt "Once" --prompt "Twice" --max_tokens 100 --temperature 0
    python inference.py --stream < story.txt
    python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors."
    python inference.py                            # on a terminal: type one prompt per line, Ctrl-D quits
"""
from exactgpt.launch import printable, require_output  # first, see there

import contextlib
import itertools
import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from exactgpt.config import DeviceConfig, UserError, counted, flag, parse_config, run_script, with_changes
from exactgpt.device import DTYPES, choose_device, choose_dtype, probe_hardware
from exactgpt.files import read_text
from exactgpt.generation import alpaca_prompt, make_decoder, stream
from exactgpt.open_model import open_model


@dataclass(kw_only=True)
class InferenceConfig(DeviceConfig):
    """The command-line flags."""
    prompt: list[str] = flag([], "text to continue, repeatable (default: standard input; on a terminal one prompt per "
                             "line)", group="text", repeat=True)
    prompt_file: list[str] = flag([], "file that holds one prompt, repeatable", repeat=True)
    instruction: str = flag("", "task for an instruction-tuned checkpoint, instead of a prompt")
    input: str = flag("", "text that the instruction refers to")
    num_seq: int = flag(5, "continuations per prompt", low=1)
    max_tokens: int = flag(50, "maximum number of new tokens per continuation", low=1)
    stop: list[str] = flag([], "text before which a continuation ends, repeatable", repeat=True)
    stream: bool = flag(False, "print the text while it is generated")
    checkpoint: str = flag("", "model_XXXXX.pt, a LoRA adapter, a Hugging Face folder or a name such as gpt2 "
                               "(default: the newest below logs/)", group="model")
    temperature: float = flag(1.0, "higher is more random, 0 takes the likeliest token", group="sampling", low=0.0)
    top_k: int = flag(50, "sample from the k likeliest tokens (0: all)", low=0)
    top_p: float = flag(1.0, "nucleus sampling: probability mass to keep (1.0: off)", above=0, high=1)
    seed: int = flag(42, "random seed; the same seed gives the same text", low=0)
    compile: str = flag("auto", "auto: CUDA graphs on a GPU, packed weights on a CPU; on: on a GPU torch.compile too, "
                                "up to a minute to start; off: neither", group="system", choices=("auto", "on", "off"))

    def check(self):
        """Raise UserError for flags that contradict each other."""
        if self.input and not self.instruction:
            raise UserError("--input needs an --instruction; use --prompt for text to continue")
        if self.instruction and (self.prompt or self.prompt_file):
            raise UserError("--instruction and --prompt cannot be combined; use one of them")
        if "" in self.stop:
            raise UserError("--stop must not be empty: every continuation would end at once")


def main(argv=None):
    """Generate text as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(InferenceConfig, argv, __doc__.splitlines()[0])
    require_output()
    if config.instruction:
        prompts = [alpaca_prompt(printable(config.instruction), printable(config.input))]
    else:
        texts = [read_text(path) for path in config.prompt_file]
        on_terminal = sys.stdin and sys.stdin.isatty()     # without any prompt they are read there
        if not (config.prompt or texts or on_terminal):
            texts = [read_text(None) if sys.stdin else ""]
            if not texts[0].strip("\r\n"):
                raise UserError('no prompt; pass --prompt "text" or run this on a terminal')
        prompts = [*map(printable, config.prompt), *(text.removesuffix("\n") for text in texts)]
    opened = open_model(config.checkpoint, tokenizer=config.tokenizer).with_tokenizer()
    if config.instruction and not opened.base:
        print(f"note: nothing says that {opened.source} was tuned on instructions (finetune_instruct.py does that), so "
              "it may just continue the text", file=sys.stderr)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, probe_hardware(device))
    print(f"{opened.summary()}, on {device} in {dtype}", file=sys.stderr)
    decoder = make_decoder(opened.model, device, DTYPES[dtype], config.compile)
    try:
        if prompts:
            print_continuations(decoder, opened.tokenizer, prompts, config, config.seed)
        else:
            run_interactively(decoder, opened.tokenizer, config)
    except (RuntimeError, MemoryError) as error:
        phrases = "out of memory", "can't allocate memory"      # CUDA's, the CPU allocator's
        if isinstance(error, RuntimeError) and not any(phrase in str(error) for phrase in phrases):
            raise
        raise UserError("out of memory: try a smaller --num_seq or --max_tokens, or fewer prompts") from error


def run_interactively(decoder, tokenizer, config):
    """Continue one prompt per line until Ctrl-D; Ctrl-C interrupts the current text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print("Type one prompt per line; Ctrl-D quits.", file=sys.stderr)
    config = with_changes(config, stream=True)
    for number in itertools.count():
        try:
            prompt = printable(input("prompt: "))
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if prompt:      # the number in the seed: repeating a prompt gives a new sample
                print_continuations(decoder, tokenizer, [prompt], config, (config.seed, number))
        except KeyboardInterrupt:
            print()
        except UserError as error:      # characters that the model does not know
            print(error, file=sys.stderr)


def print_continuations(decoder, tokenizer, prompts, config, seed):
    """Continue each prompt num_seq times; print the texts to standard output and the speed to standard error."""
    block_size = decoder.model.config.block_size
    for prompt in prompts:
        n = len(tokenizer.encode(prompt))
        if n > block_size:
            print(f"warning: a prompt has {n:,} tokens, but the model's window is {block_size:,}; its beginning is "
                  "ignored", file=sys.stderr)
    begin = time.perf_counter()
    repeated = [p for p in prompts for _ in range(config.num_seq)]
    steps = stream(decoder, tokenizer, repeated, max_tokens=config.max_tokens, stop=[*map(printable, config.stop)],
                   seed=seed, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    shown = [""] * len(repeated) if config.instruction else repeated
    if not config.stream:
        steps = [*tqdm(steps, "generating", config.max_tokens, unit="step", leave=False, disable=None)][-1:]
    n_shown = 0
    for continuations in steps:
        text = ""       # all grow at once, but a terminal can only append: each appears when those before have ended
        for prompt, continuation in zip(shown, continuations):
            text += f"> {prompt}{continuation.text}"
            if not continuation.ended:
                break
            text += "\n"
        print(text[n_shown:], end="", flush=True)
        n_shown = len(text)
    n_tokens, seconds = sum(c.n_tokens for c in continuations), time.perf_counter() - begin
    print(f"{counted(n_tokens, 'token')} in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
