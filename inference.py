"""Write text with any checkpoint.

    python inference.py --prompt "Hello, I'm a language model," --num_seq 3
    python inference.py --checkpoint gpt2 --prompt "Once" --prompt "Twice" --max_tokens 100 --temperature 0

Without --checkpoint it takes the model written last below logs/. generate() serves train.py and the page too.
"""
import sys
import time
from dataclasses import dataclass

import torch

from checkpoint import newest_model, open_model
from config import DeviceConfig, UserError, flag, parse_config, run_script
from device import DTYPES, choose_device, choose_dtype, probe
from model import KVCache
from runtime import seed_from


@dataclass(kw_only=True)
class InferenceConfig(DeviceConfig):
    prompt: list[str] = flag([], "text to continue; may be given several times", group="text", repeat=True)
    num_seq: int = flag(5, "continuations of each prompt", group="text", low=1)
    max_tokens: int = flag(50, "tokens to write after the prompt", group="text", low=1)
    checkpoint: str = flag("", "model_XXXXX.pt, a Hugging Face folder or a name such as gpt2 (default: the newest below logs/)",
                           group="model")
    temperature: float = flag(1.0, "0 takes the likeliest token, larger is wilder", group="sampling", low=0.0)
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: all", group="sampling", low=0)
    seed: int = flag(42, "same seed, same text", group="sampling", low=0)


def main(argv=None):
    config = parse_config(InferenceConfig, argv, __doc__.splitlines()[0])
    if not config.prompt:
        raise UserError('nothing to continue: give --prompt "text"')
    device = choose_device(config.device)
    dtype = DTYPES[choose_dtype(config.dtype, probe(device))]
    opened = open_model(config.checkpoint or newest_model())
    if opened.tokenizer is None:
        raise UserError(f"{opened.source} comes without a tokenizer, so text cannot be encoded for it")
    model = opened.model.to(device=device, dtype=dtype).eval()
    print(f"{opened.source}: {model.n_params():,} parameters" + (f", step {opened.step}" if opened.step is not None else "")
          + (f", validation loss {opened.val_loss:.4f}" if opened.val_loss is not None else "") + f" on {device}", file=sys.stderr)
    start = time.perf_counter()
    prompts = [p for p in config.prompt for _ in range(config.num_seq)]
    texts, n_tokens = generate(model, opened.tokenizer, prompts, max_tokens=config.max_tokens,
                               temperature=config.temperature, top_k=config.top_k, seed=config.seed)
    seconds = time.perf_counter() - start
    for text in texts:
        print(f"> {text}")
    print(f"{n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def generate(model, tokenizer, prompts, **options):
    """Continue texts: (the prompts with their continuations, the number of tokens written).

    options: those of generate_ids. An empty prompt begins a new document.
    """
    rows = [tokenizer.encode(p) or [tokenizer.eot] for p in prompts]
    written = [[] for _ in rows]
    for step in generate_ids(model, rows, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot, **options):
        for row, token in zip(written, step):
            if token is not None:
                row.append(token)
    return [p + tokenizer.decode(row) for p, row in zip(prompts, written)], sum(map(len, written))


@torch.no_grad()
def generate_ids(model, prompts, *, n_vocab, eot=None, max_tokens=50, temperature=1.0, top_k=50, seed=42):
    """Continue rows of token ids; yields, per step, a list with each row's new id (None once it has ended).

    prompts: lists of ids, of different lengths. Ids from n_vocab on (padding of the embedding) are never sampled;
    a row ends before the token `eot`. When a row's window is full, its last block_size // 2 tokens are read again.
    The model must be in eval mode; its parameters' dtype is the dtype of the computation.
    """
    block_size, device = model.config.block_size, next(model.parameters()).device
    rows = [list(p)[-block_size:] for p in prompts]
    generator = torch.Generator(device=device).manual_seed(seed_from("sample", seed))
    cache = new_cache(model, len(rows), min(block_size, max(map(len, rows)) + max_tokens))
    logits = read_prompts(model, cache, list(range(len(rows))), rows)                  # (B, V)
    ended = [False] * len(rows)
    for n in range(max_tokens):
        tokens = sample(logits[:, :n_vocab].float(), temperature, top_k, generator)    # (B,)
        step = tokens.tolist()
        ended = [e or t == eot for e, t in zip(ended, step)]
        yield [None if e else t for e, t in zip(ended, step)]
        if all(ended) or n + 1 == max_tokens:
            return
        full = [i for i, row in enumerate(rows) if len(row) == block_size]
        for i in full:
            rows[i] = rows[i][block_size - block_size // 2:]
        if full and block_size > 1:
            read_prompts(model, cache, full, [rows[i] for i in full])
        elif full:
            cache.lengths.zero_()
        for row, token in zip(rows, step):
            row.append(token)
        logits = model(tokens[:, None], cache=cache)[:, 0]
        cache.lengths += 1


def new_cache(model, batch_size, max_len):
    """An empty KVCache for a model, in its dtype and on its device."""
    weight = model.transformer.wte.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype)


def read_prompts(model, cache, indices, rows):
    """Read rows of ids into the rows `indices` of the cache, equal ones once; the logits after each (B, V)."""
    distinct = list(dict.fromkeys(map(tuple, rows)))
    lengths = torch.tensor([len(r) for r in distinct])
    idx = torch.zeros(len(distinct), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(distinct):
        idx[i, :len(row)] = torch.tensor(row)
    device = cache.lengths.device
    read = new_cache(model, len(distinct), idx.size(1))
    hidden = model.hidden(idx.to(device), cache=read)                                  # (distinct, T, C)
    read.lengths += lengths.to(device)
    which = torch.tensor([distinct.index(tuple(r)) for r in rows], device=device)
    cache.copy_rows(torch.tensor(indices, device=device), read, which)
    return model.lm_head(hidden[torch.arange(len(distinct), device=device), read.lengths - 1])[which]


def sample(logits, temperature, top_k, generator):
    """One id per row of logits (B, V): (B,). temperature 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, [-1]], -torch.inf)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


if __name__ == "__main__":
    run_script(main)
