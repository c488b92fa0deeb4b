"""Text generation with a KV cache: prefill the prompts once, then decode one token per row and step.

`stream` and `generate` continue texts; `generate_ids` is the loop below them, over token ids. Shapes as in model.py; a
batch has B rows, one per prompt.
"""
import codecs
import functools
import sys
from collections import deque

import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt.config import UserError
from exactgpt.device import attention_without_cudnn, keep_freed_memory
from exactgpt.distributed import seed_from

GREEDY_BELOW = 1e-5    # temperature; dividing by less gives a one-hot softmax or overflows
CACHE_MULTIPLE = 64    # tokens; a cache length is a multiple of this, because other lengths are several times slower
SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48
EXAMPLE_PROMPT = "Once upon a time"      # for a command to try; in a shell it looks better than the one above


# ---- texts -------------------------------------------------------------------

class Continuation:
    """The text generated so far for one prompt: whole characters only, and no possible start of a stop text."""

    def __init__(self, tokenizer, stop):
        self.text, self.n_tokens, self.ended = "", 0, False
        self._tokenizer, self._stop = tokenizer, stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")   # a character may span tokens
        self._held = ""                                                        # may be the start of a stop text

    def add(self, token):
        """Append a token id; None ends the continuation."""
        if self.ended:
            return
        self.ended = token is None
        self.n_tokens += not self.ended
        data = b"" if self.ended else self._tokenizer.decode_bytes([token])
        pending = self._held + self._utf8.decode(data, final=self.ended)
        found = [i for s in self._stop if (i := pending.find(s)) >= 0]
        if found:
            pending, self.ended = pending[:min(found)], True
        prefixes = [] if self.ended else [s[:n] for s in self._stop for n in range(len(s))]
        n_held = max((len(p) for p in prefixes if pending.endswith(p)), default=0)
        self.text, self._held = self.text + pending[:len(pending) - n_held], pending[len(pending) - n_held:]


def stream(model, tokenizer, prompts, *, stop=(), **options):
    """Continue texts; yield the same list of Continuations, one a prompt, after each step, until all have ended."""
    # An empty prompt begins a new document. A continuation ends before the first stop text. Else as in generate_ids.
    continuations = [Continuation(tokenizer, stop) for _ in prompts]
    ids = [tokenizer.encode(p) or [tokenizer.start] for p in prompts]
    for step in generate_ids(model, ids, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot, **options):
        for continuation, token in zip(continuations, step):
            continuation.add(token)
        if all(c.ended for c in continuations):
            break
        yield continuations
    for continuation in continuations:
        continuation.add(None)
    yield continuations


def generate(model, tokenizer, prompts, **options):
    """Continue texts; return (prompts with their continuations, number of new tokens). options: those of stream."""
    *_, continuations = stream(model, tokenizer, prompts, **options)
    return [p + c.text for p, c in zip(prompts, continuations)], sum(c.n_tokens for c in continuations)


def write_samples(run, config, runtime, step):
    """Return the sample texts of a training step on rank 0, and [] on the other ranks, which wait in a collective."""
    if not runtime.is_main:
        return []
    run.raw_model.eval()
    # A vocabulary of characters may lack some of a prompt's.
    prompts = SAMPLE_PROMPTS if run.tokenizer.eot is not None else [""]
    with runtime.autocast():
        texts, _ = generate(run.raw_model, run.tokenizer, prompts, max_tokens=SAMPLE_TOKENS,
                            seed=(config.seed, step))
    run.raw_model.train()
    return texts


def example_prompt(tokenizer):
    """Return a prompt that the vocabulary can encode, for a command to try."""
    try:
        tokenizer.encode(EXAMPLE_PROMPT)
        return EXAMPLE_PROMPT
    except UserError:      # a vocabulary of a few characters
        return ""


def alpaca_prompt(instruction, input=""):
    """Return Stanford Alpaca's prompt for an instruction and an optional input; the answer follows it."""
    # The wording is that of github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT). A newline follows the last
    # heading, so that no token spans prompt and answer.
    setting = ", paired with an input that provides further context" if input else ""
    question = f"### Input:\n{input}\n\n" if input else ""
    return (f"Below is an instruction that describes a task{setting}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n{question}### Response:\n")


# ---- tokens ------------------------------------------------------------------

@torch.no_grad()
def generate_ids(model, prompts, *, n_vocab, eot=None, max_tokens=50, seed=42, temperature=1.0, top_k=50, top_p=1.0):
    """Continue rows of token ids; yield each step's new ids as a list, with None for rows that have ended.

    model: a Decoder, which runs one generation at a time, or a GPT in eval mode. prompts: at least one list of at least
    one id. n_vocab: ids from here on are padding of the embedding and never sampled. eot: a row ends before this id.
    seed: a number or a tuple of numbers. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens. When a row fills
    the window, its last block_size // 2 tokens are read again, because learned positions cannot slide.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    on_cuda = decoder.device.type == "cuda"
    generator = torch.Generator(device=decoder.device).manual_seed(seed_from("sample", seed))
    block_size = decoder.model.config.block_size
    rows = [list(p)[-block_size:] for p in prompts]            # each row's window, without the tokens in `pending`
    n_candidates = 0 if temperature < GREEDY_BELOW else min(top_k or n_vocab, n_vocab)
    decoder.prepare(len(rows), max(map(len, rows)) + max_tokens, n_candidates, n_vocab, temperature, top_p)
    logits = prefill(decoder.model, decoder.cache, range(len(rows)), rows)
    ended, pending, full = [False] * len(rows), deque(), []
    for n in range(max_tokens):
        for i in full:
            rows[i] = rows[i][-(block_size // 2 + 1):]
        if full:                                               # without the last token, which the step itself reads
            prefill(decoder.model, decoder.cache, full, [rows[i][:-1] for i in full])
        decoder.noise.exponential_(generator=generator)        # outside the graph, which would use torch's generator
        if n == 0 or not decoder.graph:
            decoder.decode_one_token(logits if n == 0 else None)
        else:
            decoder.graph.replay()
        copied = decoder.tokens.to("cpu", non_blocking=on_cuda, copy=True)         # to pinned memory, from CUDA
        pending.append((copied, torch.cuda.current_stream(decoder.device).record_event() if on_cuda else None))
        # The cache holds all tokens of a row but the one just sampled, which the next step reads.
        full = [i for i, row in enumerate(rows) if len(row) + len(pending) > block_size]
        while len(pending) > (0 if full or n == max_tokens - 1 else decoder.n_ahead):
            copied, arrived = pending.popleft()
            if arrived:
                arrived.synchronize()
            step = copied.tolist()
            for row, token in zip(rows, step):
                row.append(token)
            ended = [e or t == eot for e, t in zip(ended, step)]
            yield [None if e else t for e, t in zip(ended, step)]
            if all(ended):
                return


class Decoder:
    """A model with the compiled step, CUDA graph and buffers that generation reuses from call to call."""
    # compile: torch.compile the decode step, about a minute for each new shape. cuda_graph: capture the step and replay
    # it as one launch instead of hundreds. If either fails, a notice is printed and decoding goes without it. The model
    # must be in eval mode and must not change: compiled and captured steps hold its weights. Not thread-safe.

    def __init__(self, model, compile=False, cuda_graph=False):
        self.model, self.compile, self.cuda_graph = model, compile, cuda_graph
        self.device = next(model.parameters()).device
        self.n_ahead = 1 if self.device.type == "cuda" else 0     # steps that run while the CPU shows earlier tokens
        self.graph = None
        self._compiled_model = torch.compile(model, dynamic=False, fullgraph=True) if compile else None
        self._settings = None      # of the buffers that prepare() makes

    def prepare(self, batch_size, n_tokens, n_candidates, n_vocab, temperature, top_p):
        """Make the buffers for a batch, compile the step and capture its graph, unless the last call's fit."""
        if self.compile or self.cuda_graph:
            n_tokens = max(CACHE_MULTIPLE, 1 << (n_tokens - 1).bit_length())           # few shapes to compile
        max_len = min(n_tokens, self.model.config.block_size)
        settings = batch_size, max_len, n_candidates, n_vocab, temperature, top_p
        if self._settings == settings:
            return
        self._settings = self.cache = self.graph = None        # free the memory before allocating more
        self.cache = KVCache(self.model, batch_size, max_len)
        self.tokens = torch.zeros(batch_size, dtype=torch.long, device=self.device)    # the last token of each row
        self.noise = torch.ones(batch_size, n_candidates, device=self.device)
        self._settings = settings
        for part, try_out in (("compile", self.decode_one_token), ("cuda_graph", self._capture_graph)):
            try:
                if getattr(self, part):
                    try_out()
            except Exception as error:  # compilers, Triton and drivers raise anything; eager steps always work
                reason = " ".join(str(error).split())[:160]
                print(f"{part} failed, decoding without it: {type(error).__name__}: {reason}", file=sys.stderr)
                setattr(self, part, False)

    def decode_one_token(self, logits=None):
        """Sample the next token of each row from logits (B, V); without them, read the last tokens to compute them."""
        if logits is None:
            model = self._compiled_model if self.compile else self.model
            logits = model(self.tokens[:, None], cache=self.cache)[:, 0]
            self.cache.lengths += 1    # in place, like the tokens: a CUDA graph needs the same addresses each time
        n_vocab, temperature, top_p = self._settings[3:]
        self.tokens.copy_(sample(logits[:, :n_vocab].float(), self.noise, temperature, top_p))

    def _capture_graph(self):
        """Capture the step as a CUDA graph, after runs that load kernels and allocate workspaces."""
        with torch.cuda.device(self.device):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(3):
                    self.cache.lengths.zero_()
                    self.decode_one_token()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.decode_one_token()
        self.graph = graph


def make_decoder(model, device, dtype, compile="auto"):
    """Return a Decoder for a model, which is converted, on a device and in a torch.dtype. compile: see inference.py."""
    keep_freed_memory(device)
    model = model.to(device=device, dtype=dtype).eval()
    if compile != "off" and device.type == "cpu" and dtype == torch.bfloat16:
        pack_linears(model)
    on_cuda = device.type == "cuda"
    return Decoder(model, compile=compile == "on" and on_cuda, cuda_graph=compile != "off" and on_cuda)


def prefill(model, cache, indices, prompts):
    """Read prompts (lists of ids) into the rows `indices` of the cache; return the logits (B, V) after each."""
    # Equal prompts are read only once. Empty prompts (a window of one token) only empty their rows.
    device = cache.lengths.device
    indices = torch.tensor(indices, device=device)
    if not prompts[0]:
        cache.lengths[indices] = 0
        return None
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    sources = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in unique], device=device)
    idx = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in unique], batch_first=True)    # (unique, T)
    prompt_cache = KVCache(model, *idx.shape)
    with attention_without_cudnn():
        hidden = model.hidden(idx.to(device), cache=prompt_cache)                      # (unique, T, C)
    for mine, theirs in zip(cache.layers, prompt_cache.layers):
        n = theirs.k.size(2)
        mine.k[indices, :, :n], mine.v[indices, :, :n] = theirs.k[sources], theirs.v[sources]
    cache.lengths[indices] = lengths[sources]
    return model.lm_head(hidden[torch.arange(len(unique), device=device), lengths - 1])[sources]


@torch.no_grad()
def top_next_tokens(model, ids, n_vocab, n=10):
    """Return the n likeliest next tokens after at least one id, as [(id, probability)], likeliest first."""
    ids = ids[-model.config.block_size:]
    logits = prefill(model, KVCache(model, 1, len(ids)), [0], [ids])[0, :n_vocab]
    probs, tokens = torch.softmax(logits.float(), dim=-1).topk(min(n, n_vocab))
    return list(zip(tokens.tolist(), probs.tolist()))


def sample(logits, noise, temperature=1.0, top_p=1.0):
    """Sample one id per row: (B,). logits (B, V) in fp32; noise (B, candidates) from the exponential distribution."""
    if noise.size(-1) == 0:                                # no candidates: take the likeliest
        return logits.argmax(dim=-1)
    ids = None
    if noise.size(-1) < logits.size(-1) or top_p < 1:      # topk also sorts, which top-p needs
        logits, ids = logits.topk(noise.size(-1), dim=-1)                              # (B, k), descending
    logits = logits / temperature
    if top_p < 1:                                          # keep the fewest tokens that reach top_p
        probs = torch.softmax(logits, dim=-1)
        likelier = probs.cumsum(dim=-1) - probs                     # probability mass before each token
        logits = logits.masked_fill(likelier >= top_p, -torch.inf)
    choice = (logits - noise.log()).argmax(dim=-1)      # exactly a draw from the softmax (the Gumbel-max trick)
    return choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]


def pack_linears(model):
    """Pack the weights of a bf16 model's linear layers for the CPU's kernel once, if torch can: 2.5 times as fast."""
    # The operators are those that torch.compile emits with freezing. Such a model can only be run.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.forward = functools.partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=layer.bias, attr="none",
                                          scalars=[], algorithm="")
        layer.weight = None
    model.requires_grad_(False)    # with autograd the operator is a thousand times slower


# ---- the cache ---------------------------------------------------------------

class KVCache:
    """Keys and values of up to max_len tokens in each of B rows of different lengths, in the model's dtype."""
    # A forward pass with T > 1 reads right-padded prompts into an empty cache; one with T = 1 reads the next token of
    # each row. After each pass the caller adds the tokens read to `lengths` (B,), in place because the layers share it.
    # Padding leaves garbage beyond a row's length; the mask hides it until later tokens overwrite it.

    def __init__(self, model, batch_size, max_len):
        config, weight = model.config, model.transformer.wte.weight
        max_len = -(-max_len // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.slots = torch.arange(max_len, device=weight.device)
        self.dtype = weight.dtype
        rows = torch.arange(batch_size, device=weight.device)
        shape = (batch_size, config.n_head, max_len, config.n_embd // config.n_head)   # (B, nh, max_len, hs)
        self.layers = [LayerCache(rows, self.lengths, weight.new_zeros(shape), weight.new_zeros(shape))
                       for _ in range(config.n_layer)]

    def begin(self, T):
        """Return (positions, bias) for the next T tokens; the bias is added to the scores, None: causal attention."""
        if T > 1:
            return self.slots[:T], None                                                # (T,)
        seen = self.slots <= self.lengths[:, None, None, None]                         # (B, 1, 1, max_len)
        bias = torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -torch.inf)
        return self.lengths[:, None], bias                                             # (B, 1) and (B, 1, 1, max_len)


class LayerCache:
    """One layer's keys and values (B, nh, max_len, hs), with the row indices and lengths of the KVCache."""
    # It does not refer to the KVCache: a reference cycle would keep the memory until Python's garbage collector runs.

    def __init__(self, rows, lengths, k, v):
        self.rows, self.lengths, self.k, self.v = rows, lengths, k, v

    def attend(self, q, k, v, bias):
        """Store the new keys and values and return the attention of the new queries. All (B, nh, T, hs)."""
        if bias is None:
            T = k.size(2)
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.k[self.rows, :, self.lengths] = k[:, :, 0].to(self.k.dtype)               # (B, nh, hs)
        self.v[self.rows, :, self.lengths] = v[:, :, 0].to(self.v.dtype)
        # One query per row is a matrix-vector product, for which fused kernels are not made: on a CPU plain matmuls
        # over the whole cache are 4 to 7 times as fast as scaled_dot_product_attention.
        scores = q.contiguous() @ self.k.transpose(2, 3)                               # (B, nh, 1, max_len)
        scores = torch.add(bias, scores, alpha=q.size(-1) ** -0.5)
        return torch.softmax(scores, dim=-1) @ self.v                                  # (B, nh, 1, hs)
