"""From prompts to new tokens: a prompt is read once, then each step reads one token per row over a KV cache.

generate_ids() is the only loop. A Decoder is a model made ready for it: how a step runs (plain, compiled, as a CUDA
graph) and the buffers that are kept from call to call. Shapes as in model.py; B rows, V vocabulary rows.
"""
import sys
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn as nn

from exactgpt.device import keep_freed_memory, unplanned_attention
from exactgpt.distributed import seed_from
from model import KVCache

GREEDY_BELOW = 1e-5    # a temperature: logits divided by less make a one-hot softmax, or overflow
SMALLEST_CACHE = 128   # tokens, where shapes are fixed; then powers of two: few shapes to compile


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
    with unplanned_attention():
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
