"""From prompts to new tokens: a prompt is read once, then each step reads one token per row over a KV cache.

`stream` and `generate` continue texts, generate_ids() is the loop below them, over ids. A Decoder is a model made ready
for it: how a step runs (plain, compiled, as a CUDA graph) and the buffers that are kept from call to call. Shapes as in
model.py; B rows, V vocabulary rows.
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

GREEDY_BELOW = 1e-5    # a temperature: logits divided by less make a one-hot softmax, or overflow
SMALLEST_CACHE = 128   # tokens, where shapes are fixed; then powers of two: few shapes to compile
CACHE_STEP = 64        # a KVCache holds a multiple of so many tokens: even sizes are several times as fast as odd ones
SAMPLE_PROMPTS = ["", "Hello, I'm a language model,"]   # "": a new document
SAMPLE_TOKENS = 48


# -----------------------------------------------------------------------------
# texts

class Continuation:
    """What one row has written so far: whole characters, and nothing that may turn out to begin a stop text."""

    def __init__(self, tokenizer, stop):
        self.text, self.n_tokens, self.ended = "", 0, False
        self._tokenizer, self._stop = tokenizer, stop
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token):
        """Take the next id; None ends the row."""
        if self.ended:
            return
        self.ended = token is None
        self.n_tokens += not self.ended
        data = b"" if self.ended else self._tokenizer.decode_bytes([token])
        pending = self._held + self._characters.decode(data, final=self.ended)
        found = [place for s in self._stop if (place := pending.find(s)) >= 0]
        if found:
            pending, self.ended = pending[:min(found)], True
        beginnings = [] if self.ended else [s[:n] for s in self._stop for n in range(len(s))]
        n_held = max((len(b) for b in beginnings if pending.endswith(b)), default=0)
        self.text, self._held = self.text + pending[:len(pending) - n_held], pending[len(pending) - n_held:]


def stream(model, tokenizer, prompts, *, stop=(), **options):
    """Continue texts; yields, step by step, the same list of one Continuation per prompt, grown, until all have ended.

    model: a GPT in eval mode, or a Decoder. stop: texts before which a continuation ends. options: generate_ids'.
    An empty prompt begins a new document.
    """
    rows = [Continuation(tokenizer, stop) for _ in prompts]
    ids = [tokenizer.encode(p) or [tokenizer.eot] for p in prompts]
    for step in generate_ids(model, ids, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot, **options):
        for row, token in zip(rows, step):
            row.add(token)
        if all(row.ended for row in rows):
            break
        yield rows
    for row in rows:
        row.add(None)
    yield rows


def generate(model, tokenizer, prompts, **options):
    """Continue texts: (the prompts with their continuations, the number of tokens written). options: stream()'s."""
    rows = last(stream(model, tokenizer, prompts, **options))
    return [p + row.text for p, row in zip(prompts, rows)], sum(row.n_tokens for row in rows)


def last(items):
    """The last item of an iterator."""
    for item in items:  # noqa: B007
        pass
    return item


def write_samples(run, config, runtime, step):
    """Texts that the model writes at this step, on rank 0; the others have nothing to wait for."""
    if not runtime.is_main:
        return []
    run.raw.eval()
    with runtime.autocast():
        texts, _ = generate(run.raw, run.tokenizer, SAMPLE_PROMPTS, max_tokens=SAMPLE_TOKENS, seed=(config.seed, step))
    run.raw.train()
    return texts


def alpaca_prompt(instruction, input=""):
    """Stanford Alpaca's prompt for an instruction and, where there is one, its input; the answer follows it.

    The words are those of github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT); a line end follows the last
    heading, so that the answer begins with a token of its own.
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
    """How the next token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all tokens."""
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    @property
    def greedy(self):
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < GREEDY_BELOW

    def n_candidates(self, n_vocab):
        """How many tokens a draw is among; 0: nothing is drawn."""
        return 0 if self.greedy else min(self.top_k, n_vocab) if self.top_k else n_vocab


@torch.no_grad()
def generate_ids(model, prompts, *, n_vocab, eot=None, max_tokens=50, seed=42, **sampling):
    """Continue rows of token ids; yields, per step, a list with each row's new id (None once it has ended).

    model: a Decoder, or a GPT in eval mode, whose parameters' dtype is the dtype of the computation; a Decoder makes
    one generation at a time, the next takes over its cache. prompts: at least one list of at least one id. Ids from
    n_vocab on (padding of the embedding) are never sampled; a row ends before the token `eot`. When a row's window is
    full, its last block_size // 2 tokens are read again. sampling: Sampling's fields. seed: a number or a tuple of
    them.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    generator = torch.Generator(device=decoder.device).manual_seed(seed_from("sample", seed))
    steps = decoder.steps(prompts, n_vocab, max_tokens, Sampling(**sampling), generator)
    ended = [False] * len(prompts)
    for tokens in one_ahead(steps) if decoder.device.type == "cuda" else steps:
        step = tokens.read()
        ended = [e or t == eot for e, t in zip(ended, step)]
        yield [None if e else t for e, t in zip(ended, step)]
        if all(ended):
            return


def one_ahead(steps):
    """The items of an iterator, each handed out after the next one was asked for: a GPU works while its last tokens
    are read and shown."""
    previous = next(steps)
    for step in steps:
        yield previous
        previous = step
    yield previous


class Decoder:
    """A model made ready to write.

    compile: torch.compile the decode step, a minute's work for the first of each shape. cuda_graph: record the step
    once and launch it whole; a step is hundreds of launches otherwise. One that fails is left out with a notice. The
    model must be in eval mode and stay as it is: what was compiled or recorded has its weights. One thread at a time.
    """

    def __init__(self, model, compile=False, cuda_graph=False):
        self.model, self.compile, self.cuda_graph = model, compile, cuda_graph
        self.device = next(model.parameters()).device

        def read_token(tokens, cache):             # no method: Decoder and step would hold each other in a circle
            """The logits (B, V) after one more token of each row (B,)."""
            return model(tokens[:, None], cache=cache)[:, 0]
        self._read_token = read_token
        self._forward = torch.compile(read_token, dynamic=False, fullgraph=True) if compile else read_token
        self._step = None      # the last DecodeStep: the next call has the same shape more often than not

    def steps(self, prompts, n_vocab, max_tokens, sampling, generator):
        """Yields max_tokens times the Drawn tokens of all rows."""
        block_size = self.model.config.block_size
        rows = [list(p)[-block_size:] for p in prompts]        # each row's window, without the tokens in `unread`
        lengths = [len(row) for row in rows]                   # how much of it is in the cache
        step = self._make_step(len(rows), max(lengths) + max_tokens, n_vocab, sampling)
        step.draw(read_prompts(self.model, step.cache, list(range(len(rows))), rows), generator)
        unread = deque([Drawn(step.tokens)])
        yield unread[0]
        for _ in range(max_tokens - 1):
            full = [i for i, length in enumerate(lengths) if length == block_size]
            if full:
                while unread:
                    for row, token in zip(rows, unread.popleft().read()):
                        row.append(token)
                for i in full:                                 # the last token is read by the step itself
                    rows[i] = rows[i][len(rows[i]) - 1 - block_size // 2:]
                    lengths[i] = block_size // 2
                read_prompts(self.model, step.cache, full, [rows[i][:-1] for i in full])
            step(generator)
            lengths = [length + 1 for length in lengths]
            unread.append(Drawn(step.tokens))
            yield unread[-1]

    def _make_step(self, batch_size, n_tokens, n_vocab, sampling):
        """The DecodeStep for a batch, with an empty cache: the last one again if it fits."""
        block_size = self.model.config.block_size
        fixed = self.compile or self.cuda_graph
        max_len = min(block_size, max(SMALLEST_CACHE, 1 << (n_tokens - 1).bit_length()) if fixed else n_tokens)
        key = batch_size, max_len, n_vocab, sampling
        if self._step is None or self._step.key != key:
            self._step = None                                  # its memory is free before more is taken
            cache = new_cache(self.model, batch_size, max_len, fixed)
            self._step = DecodeStep(key, self._forward, cache, n_vocab, sampling)
            self._warm_up(self._step)
        self._step.cache.lengths.zero_()
        return self._step

    def _warm_up(self, step):
        """Compile and record the step; without what fails."""
        for part in ("compile", "cuda_graph"):
            if not getattr(self, part):
                continue
            try:
                if part == "cuda_graph":
                    step.record()
                else:
                    self._compile(step)
            except Exception as error:  # of a compiler, of Triton, of a driver: any kind, and plain steps always work
                why = " ".join(str(error).split())[:160]
                print(f"without {part}: {type(error).__name__}: {why}", file=sys.stderr)
                setattr(self, part, False)
                if part == "compile":
                    self._forward = step.forward = self._read_token

    def _compile(self, step):
        """Run a step once, which compiles it; on a CPU with freezing, which lays out the weights for the kernels."""
        import torch._inductor.config as inductor
        with inductor.patch(freezing=self.device.type == "cpu"):
            step.run_once()


def make_decoder(model, device, dtype, compile="auto"):
    """A Decoder of a model for a device and a torch.dtype, which takes the model over.

    compile: "auto" for what is fast and starts at once (CUDA graphs on a GPU, packed weights for bf16 on a CPU); "on"
    for torch.compile, with CUDA graphs; "off" for plain steps.
    """
    keep_freed_memory(device)
    model = model.to(device=device, dtype=dtype).eval()
    if compile == "auto" and device.type == "cpu" and dtype == torch.bfloat16:
        pack_linears(model)
    return Decoder(model, compile=compile == "on", cuda_graph=compile != "off" and device.type == "cuda")


class DecodeStep:
    """One token for each row of a batch. Its buffers keep their addresses, as CUDA graphs need it."""

    def __init__(self, key, forward, cache, n_vocab, sampling):
        self.key, self.forward, self.cache, self.n_vocab, self.sampling = key, forward, cache, n_vocab, sampling
        device, batch_size = cache.lengths.device, len(cache.lengths)
        self.tokens = torch.zeros(batch_size, dtype=torch.long, device=device)         # the last of each row
        self.noise = torch.ones(batch_size, sampling.n_candidates(n_vocab), device=device)
        self.graph = None

    def __call__(self, generator):
        """Read the last tokens and draw the next ones."""
        self._renew_noise(generator)
        if self.graph:
            self.graph.replay()
        else:
            self._run()

    def draw(self, logits, generator):
        """Draw the first tokens from the logits (B, V) after the prompts."""
        self._renew_noise(generator)
        self.tokens.copy_(pick(logits[:, :self.n_vocab].float(), self.noise, self.sampling))

    def _renew_noise(self, generator):
        if not self.sampling.greedy:       # outside the graph, which would draw from torch's own generator
            self.noise.exponential_(generator=generator)

    def _run(self):
        logits = self.forward(self.tokens, self.cache)                                 # (B, V)
        self.cache.lengths += 1
        self.tokens.copy_(pick(logits[:, :self.n_vocab].float(), self.noise, self.sampling))

    def run_once(self):
        """A step on an empty cache, which is left empty."""
        self.cache.lengths.zero_()
        self._run()
        self.cache.lengths.zero_()

    def record(self):
        """Record the step as a CUDA graph, after runs in which kernels are loaded and workspaces made."""
        device = self.tokens.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.run_once()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        self.graph = graph


class Drawn:
    """The tokens of a step, on their way to the CPU."""

    def __init__(self, tokens):
        self._tokens = tokens.to("cpu", non_blocking=tokens.is_cuda, copy=True)   # pinned, on CUDA
        self._arrived = torch.cuda.Event() if tokens.is_cuda else None
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    def read(self):
        """The ids as a list, waited for where they are not there yet."""
        if self._arrived:
            self._arrived.synchronize()
        return self._tokens.tolist()


def new_cache(model, batch_size, max_len, fixed_shapes=False):
    """An empty KVCache for a model, in its dtype and on its device."""
    weight = model.transformer.wte.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype,
                   fixed_shapes or weight.device.type != "cpu")


def read_prompts(model, cache, indices, rows):
    """Read rows of ids into the rows `indices` of the cache, equal ones once; the logits after each (B, V).

    Rows without ids (a window of one token) only empty theirs; they give None.
    """
    device = cache.lengths.device
    indices = torch.tensor(indices, device=device)
    if not rows[0]:
        cache.lengths[indices] = 0
        return None
    numbers = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}        # distinct rows: 0, 1, ...
    lengths = torch.tensor([len(row) for row in numbers])
    idx = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.long)              # (distinct, T)
    for row, i in numbers.items():
        idx[i, :len(row)] = torch.tensor(row)
    read = new_cache(model, len(numbers), idx.size(1))
    with attention_without_cudnn():
        hidden = model.hidden(idx.to(device), cache=read)                              # (distinct, T, C)
    read.lengths += lengths.to(device)
    which = torch.tensor([numbers[tuple(row)] for row in rows], device=device)
    cache.copy_rows(indices, read, which)
    return model.lm_head(hidden[torch.arange(len(numbers), device=device), read.lengths - 1])[which]


@torch.no_grad()
def likeliest_next(model, ids, n_vocab, n=10):
    """The n likeliest tokens after a text, the likeliest first: [(id, probability)]. ids: its tokens, one at least."""
    ids = ids[-model.config.block_size:]
    logits = read_prompts(model, new_cache(model, 1, len(ids)), [0], [ids])[0, :n_vocab]
    shares, tokens = torch.softmax(logits.float(), dim=-1).topk(min(n, n_vocab))
    return list(zip(tokens.tolist(), shares.tolist()))


def pick(logits, noise, sampling):
    """One id per row: (B,). logits (B, V) fp32; noise (B, candidates) from the exponential distribution."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    ids = None
    if noise.size(-1) < logits.size(-1) or sampling.top_p < 1:
        logits, ids = logits.topk(noise.size(-1), dim=-1)                              # (B, k), the likeliest first
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        p = torch.softmax(logits, dim=-1)
        likelier = p.cumsum(dim=-1) - p            # the probability of those that stand before it
        logits = logits.masked_fill(likelier >= sampling.top_p, -torch.inf)
    choice = (logits - noise.log()).argmax(dim=-1)  # exactly a draw from the softmax (the Gumbel-max trick)
    return choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]


class PackedLinear(nn.Module):
    """A bf16 nn.Linear on a CPU with its weight laid out for the kernel once, not at each call: 2.5 times as fast.

    The operators are those that torch.compile uses with freezing.
    """

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model):
    """Replace the linear layers of a bf16 model on a CPU by PackedLinears, where this build of torch has them.

    The model can only be run after it, not trained or saved.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    model.requires_grad_(False)    # the operator is a thousand times slower where autograd watches


# -----------------------------------------------------------------------------
# the cache

class KVCache:
    """Keys and values of the tokens read so far, for B rows of different lengths; the caller owns it.

    A forward pass of T > 1 tokens reads prompts, right-padded, into an empty cache; one of T = 1 reads the next token
    of each row. After each pass the caller adds what was read to `lengths` (B,), in place: the layers share it.
    Padding leaves rubbish beyond a row's length: later tokens write over it, and no mask ever shows it.
    fixed_shapes: memory for max_len tokens is there from the start, and nothing is read back from the device, as
    torch.compile and CUDA graphs need it; else it grows with the longest row.
    """

    def __init__(self, config, batch_size, max_len, device, dtype, fixed_shapes=False):
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.rows = torch.arange(batch_size, device=device)
        max_len = -(-max_len // CACHE_STEP) * CACHE_STEP
        self.slots = torch.arange(max_len, device=device)
        self.dtype, self.fixed_shapes = dtype, fixed_shapes
        self.reserved = max_len if fixed_shapes else 0
        shape = (batch_size, config.n_head, self.reserved, config.n_embd // config.n_head)   # (B, nh, reserved, hs)
        self.layers = [_LayerCache(self.rows, self.lengths, torch.zeros(shape, dtype=dtype, device=device),
                                   torch.zeros(shape, dtype=dtype, device=device)) for _ in range(config.n_layer)]

    def begin(self, T):
        """The positions of T tokens about to be read, (T,); for T = 1 (B, 1), and what is added to their scores,
        (B, 1, 1, reserved)."""
        if not self.fixed_shapes:
            self._reserve(int(self.lengths.max()) + T)
        if T > 1:
            return self.slots[:T], None
        seen = self.slots[:self.reserved] <= self.lengths[:, None, None, None]         # (B, 1, 1, reserved)
        return self.lengths[:, None], torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -math.inf)

    def _reserve(self, n):
        """Have room for n tokens per row: in steps, so that all of it can be read at once and shapes repeat."""
        if n > self.reserved:
            self.reserved = -(-n // CACHE_STEP) * CACHE_STEP
            for layer in self.layers:
                layer.grow(self.reserved)

    def copy_rows(self, rows, source, source_rows):
        """Take over rows of another cache, whose max_len may be shorter; rows, source_rows: indices (n,)."""
        n = source.reserved
        if not self.fixed_shapes:
            self._reserve(n)
        for mine, theirs in zip(self.layers, source.layers):
            mine.k[rows, :, :n] = theirs.k[source_rows]
            mine.v[rows, :, :n] = theirs.v[source_rows]
        self.lengths[rows] = source.lengths[source_rows]


class _LayerCache:
    """One layer's share of a KVCache: keys and values (B, nh, reserved, hs), and the cache's own rows and lengths.

    Not the cache itself: in a circle they would hold each other, and their memory, until Python's collector comes.
    """

    def __init__(self, rows, lengths, k, v):
        self.rows, self.lengths, self.k, self.v = rows, lengths, k, v

    def grow(self, n):
        """Have room for n tokens per row."""
        more = (0, 0, 0, n - self.k.size(2))
        self.k, self.v = F.pad(self.k, more), F.pad(self.v, more)

    def attend(self, q, k, v, bias):
        """Store the new keys and values; what the new tokens read of all they may look at. All (B, nh, T, hs).

        One query per row is a product of a matrix with a vector, for which the fused kernels are not made: on a CPU
        plain products of whole tensors are 4 to 7 times as fast as scaled_dot_product_attention.
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
