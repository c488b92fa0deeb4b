"""Text generation with a KV cache: prefill the prompts once, then decode one token per row and step.

`stream` and `generate` continue texts; `generate_ids` is the loop below them, over token ids. A Decoder keeps the
compiled step, its CUDA graph and its buffers from call to call. Shapes as in model.py; a batch has B rows, one per
prompt.
"""
import codecs
import math
import sys
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from exactgpt.device import attention_without_cudnn, keep_freed_memory
from exactgpt.distributed import seed_from

GREEDY_BELOW = 1e-5    # temperature; dividing by less gives a one-hot softmax or overflows
MIN_FIXED_CACHE = 128  # tokens; fixed shapes double from here, so that few of them are compiled
CACHE_MULTIPLE = 64    # tokens; a cache length is a multiple of this, because other lengths are several times slower
SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48


# -----------------------------------------------------------------------------
# texts

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
    """Continue texts; yield the same list of Continuations after each step, until all have ended.

    model: a GPT in eval mode, or a Decoder. prompts: one Continuation each; an empty prompt begins a new document.
    stop: texts; a continuation ends before the first of them. options: those of generate_ids.
    """
    continuations = [Continuation(tokenizer, stop) for _ in prompts]
    ids = [tokenizer.encode(p) or [tokenizer.eot] for p in prompts]
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
    with runtime.autocast():
        texts, _ = generate(run.raw_model, run.tokenizer, SAMPLE_PROMPTS, max_tokens=SAMPLE_TOKENS,
                            seed=(config.seed, step))
    run.raw_model.train()
    return texts


def alpaca_prompt(instruction, input=""):
    """Return Stanford Alpaca's prompt for an instruction and an optional input; the answer follows it.

    The wording is that of github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT). A newline follows the last
    heading, so that no token spans prompt and answer.
    """
    if input:
        return ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")


# -----------------------------------------------------------------------------
# tokens

@dataclass(frozen=True)
class Sampling:
    """Sampling settings: temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens."""
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    @property
    def greedy(self):
        """True if the likeliest token is taken without sampling."""
        return self.temperature < GREEDY_BELOW

    def n_candidates(self, n_vocab):
        """Return the number of tokens to sample from (0: greedy)."""
        return 0 if self.greedy else min(self.top_k, n_vocab) if self.top_k else n_vocab


@torch.no_grad()
def generate_ids(model, prompts, *, n_vocab, eot=None, max_tokens=50, seed=42, **sampling):
    """Continue rows of token ids; yield each step's new ids as a list, with None for rows that have ended.

    model: a Decoder, or a GPT in eval mode, which computes in the dtype of its parameters. A Decoder runs one
    generation at a time; the next one reuses its cache. prompts: at least one list of at least one id. n_vocab: ids
    from here on are padding of the embedding and never sampled. eot: a row ends before this id. seed: a number or a
    tuple of numbers. sampling: the fields of Sampling. When a row fills the window, its last block_size // 2 tokens
    are read again, because learned positions cannot slide.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    generator = torch.Generator(device=decoder.device).manual_seed(seed_from("sample", seed))
    steps = decoder.steps(prompts, n_vocab, max_tokens, Sampling(**sampling), generator)
    ended = [False] * len(prompts)
    for tokens in prefetch(steps) if decoder.device.type == "cuda" else steps:
        step = tokens.tolist()
        ended = [e or t == eot for e, t in zip(ended, step)]
        yield [None if e else t for e, t in zip(ended, step)]
        if all(ended):
            return


def prefetch(items):
    """Request the next item of an iterator before yielding the current one.

    A GPU then computes the next step while the CPU waits for the last tokens and shows them.
    """
    current = next(items)
    for following in items:
        yield current
        current = following
    yield current


class Decoder:
    """A model with the compiled step, CUDA graph and buffers that generation reuses from call to call.

    compile: torch.compile the decode step, about a minute for each new shape. cuda_graph: capture the step and replay
    it as one launch instead of hundreds. If either fails, a notice is printed and decoding goes without it. The model
    must be in eval mode and must not change: compiled and captured steps hold its weights. Not thread-safe.
    """

    def __init__(self, model, compile=False, cuda_graph=False):
        self.model, self.compile, self.cuda_graph = model, compile, cuda_graph
        self.device = next(model.parameters()).device

        def forward_token(tokens, cache):          # not a method: Decoder and DecodeStep would form a reference cycle
            """Return the logits (B, V) after one more token of each row (B,)."""
            return model(tokens[:, None], cache=cache)[:, 0]
        self._eager_forward = forward_token
        self._forward = torch.compile(forward_token, dynamic=False, fullgraph=True) if compile else forward_token
        self._step = None      # the last DecodeStep; the next call often has the same shape

    def steps(self, prompts, n_vocab, max_tokens, sampling, generator):
        """Yield the PendingTokens of each of max_tokens steps."""
        block_size = self.model.config.block_size
        rows = [list(p)[-block_size:] for p in prompts]        # each row's window, without the tokens in `pending`
        lengths = [len(row) for row in rows]                   # of each row in the cache
        step = self._get_step(len(rows), max(lengths) + max_tokens, n_vocab, sampling)
        step.sample_first(prefill(self.model, step.cache, list(range(len(rows))), rows), generator)
        pending = deque([PendingTokens(step.tokens)])
        yield pending[0]
        for _ in range(max_tokens - 1):
            full = [i for i, length in enumerate(lengths) if length == block_size]
            if full:
                while pending:
                    for row, token in zip(rows, pending.popleft().tolist()):
                        row.append(token)
                for i in full:                                 # without the last token, which the step itself reads
                    rows[i] = rows[i][len(rows[i]) - 1 - block_size // 2:]
                    lengths[i] = block_size // 2
                prefill(self.model, step.cache, full, [rows[i][:-1] for i in full])
            step.decode_one_token(generator)
            lengths = [length + 1 for length in lengths]
            pending.append(PendingTokens(step.tokens))
            yield pending[-1]

    def _get_step(self, batch_size, n_tokens, n_vocab, sampling):
        """Return a DecodeStep with an empty cache for n_tokens per row; reuse the last one if it fits."""
        block_size = self.model.config.block_size
        fixed = self.compile or self.cuda_graph
        max_len = min(block_size, max(MIN_FIXED_CACHE, 1 << (n_tokens - 1).bit_length()) if fixed else n_tokens)
        key = batch_size, max_len, n_vocab, sampling
        if self._step is None or self._step.key != key:
            self._step = None                                  # free its memory before allocating more
            cache = new_cache(self.model, batch_size, max_len, fixed)
            self._step = DecodeStep(key, self._forward, cache, n_vocab, sampling)
            self._warm_up(self._step)
        self._step.cache.lengths.zero_()
        return self._step

    def _warm_up(self, step):
        """Compile the step and capture its CUDA graph; turn off what fails."""
        for part in ("compile", "cuda_graph"):
            if not getattr(self, part):
                continue
            try:
                if part == "cuda_graph":
                    step.capture_graph()
                else:
                    self._compile(step)
            except Exception as error:  # compilers, Triton and drivers raise anything; eager steps always work
                reason = " ".join(str(error).split())[:160]
                print(f"{part} failed, decoding without it: {type(error).__name__}: {reason}", file=sys.stderr)
                setattr(self, part, False)
                if part == "compile":
                    self._forward = step.forward = self._eager_forward

    def _compile(self, step):
        """Compile the step by running it once; on a CPU with freezing, which repacks the weights for the kernels."""
        import torch._inductor.config as inductor
        with inductor.patch(freezing=self.device.type == "cpu"):
            step.run_on_empty_cache()


def make_decoder(model, device, dtype, compile="auto"):
    """Return a Decoder for a model on a device and in a torch.dtype; the model itself is converted.

    compile: "auto" for what is fast without compiling (CUDA graphs on a GPU, packed weights for bf16 on a CPU), "on"
    for torch.compile, with CUDA graphs on a GPU, "off" for eager steps.
    """
    keep_freed_memory(device)
    model = model.to(device=device, dtype=dtype).eval()
    if compile == "auto" and device.type == "cpu" and dtype == torch.bfloat16:
        pack_linears(model)
    return Decoder(model, compile=compile == "on", cuda_graph=compile != "off" and device.type == "cuda")


class DecodeStep:
    """A step that decodes one token per row. Its buffers keep their addresses, as CUDA graphs require."""

    def __init__(self, key, forward, cache, n_vocab, sampling):
        self.key, self.forward, self.cache, self.n_vocab, self.sampling = key, forward, cache, n_vocab, sampling
        device, batch_size = cache.lengths.device, len(cache.lengths)
        self.tokens = torch.zeros(batch_size, dtype=torch.long, device=device)         # the last token of each row
        self.noise = torch.ones(batch_size, sampling.n_candidates(n_vocab), device=device)
        self.graph = None

    def sample_first(self, logits, generator):
        """Sample the first tokens from the logits (B, V) after the prompts."""
        self._fill_noise(generator)
        self._sample(logits)

    def decode_one_token(self, generator):
        """Read the last token of each row and sample the next one."""
        self._fill_noise(generator)
        if self.graph:
            self.graph.replay()
        else:
            self._run()

    def _fill_noise(self, generator):
        if not self.sampling.greedy:       # outside the graph, which would use torch's default generator
            self.noise.exponential_(generator=generator)

    def _run(self):
        logits = self.forward(self.tokens, self.cache)                                 # (B, V)
        self.cache.lengths += 1
        self._sample(logits)

    def _sample(self, logits):
        self.tokens.copy_(sample(logits[:, :self.n_vocab].float(), self.noise, self.sampling))

    def run_on_empty_cache(self):
        """Run the step once on an empty cache, and empty it again."""
        self.cache.lengths.zero_()
        self._run()
        self.cache.lengths.zero_()

    def capture_graph(self):
        """Capture the step as a CUDA graph, after runs that load kernels and allocate workspaces."""
        device = self.tokens.device
        with torch.cuda.device(device):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(3):
                    self.run_on_empty_cache()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        self.graph = graph


class PendingTokens:
    """The tokens of one step while they are copied to the CPU."""

    def __init__(self, tokens):
        self._tokens = tokens.to("cpu", non_blocking=tokens.is_cuda, copy=True)   # to pinned memory, from CUDA
        self._arrived = torch.cuda.Event() if tokens.is_cuda else None
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    def tolist(self):
        """Wait for the copy and return the ids as a list."""
        if self._arrived:
            self._arrived.synchronize()
        return self._tokens.tolist()


def new_cache(model, batch_size, max_len, fixed_shapes=False):
    """Return an empty KVCache in the model's dtype and on its device."""
    weight = model.transformer.wte.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype,
                   fixed_shapes or weight.device.type != "cpu")


def prefill(model, cache, indices, prompts):
    """Read prompts (lists of ids) into the rows `indices` of the cache; return the logits (B, V) after each.

    Equal prompts are read only once. Empty prompts (a window of one token) only empty their rows and return None.
    """
    device = cache.lengths.device
    indices = torch.tensor(indices, device=device)
    if not prompts[0]:
        cache.lengths[indices] = 0
        return None
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    lengths = torch.tensor([len(prompt) for prompt in unique])
    idx = torch.zeros(len(unique), int(lengths.max()), dtype=torch.long)               # (unique, T)
    for prompt, i in unique.items():
        idx[i, :len(prompt)] = torch.tensor(prompt)
    prompt_cache = new_cache(model, len(unique), idx.size(1))
    with attention_without_cudnn():
        hidden = model.hidden(idx.to(device), cache=prompt_cache)                      # (unique, T, C)
    prompt_cache.lengths += lengths.to(device)
    sources = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=device)
    cache.copy_rows(indices, prompt_cache, sources)
    return model.lm_head(hidden[torch.arange(len(unique), device=device), prompt_cache.lengths - 1])[sources]


@torch.no_grad()
def top_next_tokens(model, ids, n_vocab, n=10):
    """Return the n likeliest next tokens after at least one id, as [(id, probability)], likeliest first."""
    ids = ids[-model.config.block_size:]
    logits = prefill(model, new_cache(model, 1, len(ids)), [0], [ids])[0, :n_vocab]
    probs, tokens = torch.softmax(logits.float(), dim=-1).topk(min(n, n_vocab))
    return list(zip(tokens.tolist(), probs.tolist()))


def sample(logits, noise, sampling):
    """Sample one id per row: (B,). logits (B, V) in fp32; noise (B, candidates) from the exponential distribution."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    ids = None
    if noise.size(-1) < logits.size(-1) or sampling.top_p < 1:      # topk also sorts, which top-p needs
        logits, ids = logits.topk(noise.size(-1), dim=-1)                              # (B, k), descending
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = mask_top_p(logits, sampling.top_p)
    choice = (logits - noise.log()).argmax(dim=-1)      # exactly a draw from the softmax (the Gumbel-max trick)
    return choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]


def mask_top_p(logits, top_p):
    """Mask all but the fewest tokens that reach the probability mass top_p; logits (B, k), descending."""
    probs = torch.softmax(logits, dim=-1)
    likelier = probs.cumsum(dim=-1) - probs             # probability mass before each token
    return logits.masked_fill(likelier >= top_p, -torch.inf)


class PackedLinear(nn.Module):
    """A bf16 nn.Linear on a CPU whose weight is packed for the kernel once, not at each call: 2.5 times as fast.

    The operators are those that torch.compile emits with freezing.
    """

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x):
        """Map x (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model):
    """Replace the linear layers of a bf16 model on a CPU by PackedLinears, if this build of torch supports them.

    Afterwards the model can only be run, not trained or saved.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    model.requires_grad_(False)    # with autograd the operator is a thousand times slower


# -----------------------------------------------------------------------------
# the cache

class KVCache:
    """Keys and values of the tokens read so far, for B rows of different lengths.

    A forward pass with T > 1 reads right-padded prompts into an empty cache; one with T = 1 reads the next token of
    each row. After each pass the caller adds the tokens read to `lengths` (B,), in place because the layers share it.
    Padding leaves garbage beyond a row's length; the mask hides it until later tokens overwrite it.
    fixed_shapes: allocate max_len tokens at once and never read back from the device, as torch.compile and CUDA
    graphs require. Otherwise the cache grows with the longest row.
    """

    def __init__(self, config, batch_size, max_len, device, dtype, fixed_shapes=False):
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.rows = torch.arange(batch_size, device=device)
        max_len = -(-max_len // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.slots = torch.arange(max_len, device=device)
        self.dtype, self.fixed_shapes = dtype, fixed_shapes
        self.reserved = max_len if fixed_shapes else 0
        shape = (batch_size, config.n_head, self.reserved, config.n_embd // config.n_head)   # (B, nh, reserved, hs)
        self.layers = [_LayerCache(self.rows, self.lengths, torch.zeros(shape, dtype=dtype, device=device),
                                   torch.zeros(shape, dtype=dtype, device=device)) for _ in range(config.n_layer)]

    def begin(self, T):
        """Return (positions, attention bias) for the next T tokens.

        T > 1: (T,) and None, for causal attention. T = 1: (B, 1) and (B, 1, 1, reserved), added to the scores.
        """
        if not self.fixed_shapes:
            self._reserve(int(self.lengths.max()) + T)
        if T > 1:
            return self.slots[:T], None
        seen = self.slots[:self.reserved] <= self.lengths[:, None, None, None]         # (B, 1, 1, reserved)
        return self.lengths[:, None], torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -math.inf)

    def _reserve(self, n):
        """Make room for n tokens per row, rounded up so that shapes repeat."""
        if n > self.reserved:
            self.reserved = -(-n // CACHE_MULTIPLE) * CACHE_MULTIPLE
            for layer in self.layers:
                layer.grow(self.reserved)

    def copy_rows(self, rows, source, source_rows):
        """Copy rows from another cache, which may be shorter; rows, source_rows: indices (n,)."""
        n = source.reserved
        if not self.fixed_shapes:
            self._reserve(n)
        for mine, theirs in zip(self.layers, source.layers):
            mine.k[rows, :, :n] = theirs.k[source_rows]
            mine.v[rows, :, :n] = theirs.v[source_rows]
        self.lengths[rows] = source.lengths[source_rows]


class _LayerCache:
    """One layer's keys and values (B, nh, reserved, hs), with the row indices and lengths of the KVCache.

    It does not refer to the KVCache: a reference cycle would keep the memory until Python's garbage collector runs.
    """

    def __init__(self, rows, lengths, k, v):
        self.rows, self.lengths, self.k, self.v = rows, lengths, k, v

    def grow(self, n):
        """Make room for n tokens per row."""
        padding = (0, 0, 0, n - self.k.size(2))
        self.k, self.v = F.pad(self.k, padding), F.pad(self.v, padding)

    def attend(self, q, k, v, bias):
        """Store the new keys and values and return the attention of the new queries. All (B, nh, T, hs).

        One query per row is a matrix-vector product, for which fused kernels are not made: on a CPU plain matmuls
        over the whole cache are 4 to 7 times as fast as scaled_dot_product_attention.
        """
        if bias is None:
            T = k.size(2)
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.k[self.rows, :, self.lengths] = k[:, :, 0].to(self.k.dtype)               # (B, nh, hs)
        self.v[self.rows, :, self.lengths] = v[:, :, 0].to(self.v.dtype)
        scores = q.contiguous() @ self.k.transpose(2, 3)                               # (B, nh, 1, reserved)
        scores = torch.add(bias, scores, alpha=q.size(-1) ** -0.5)
        return torch.softmax(scores, dim=-1) @ self.v                                  # (B, nh, 1, hs)
