"""bench.generate warms up with the shapes that it times, so each batch size is compiled once, not twice."""
import torch

from bench import generate
from exactgpt.generation import Decoder
from model import GPT2_SIZES


def test_the_decode_step_is_compiled_once_for_each_batch_size(monkeypatch):
    compiled = []
    monkeypatch.setitem(GPT2_SIZES, "gpt2", dict(n_layer=1, n_head=1, n_embd=4))
    monkeypatch.setattr(generate, "load_peers", lambda *args: {"fp32": None})
    monkeypatch.setattr(generate, "fastest_dtype", lambda *args: "fp32")
    for name in ("check_equal_work", "transformers_generate", "write_results"):
        monkeypatch.setattr(generate, name, lambda *args: None)
    monkeypatch.setattr(generate, "make_decoder", lambda model, device, dtype, compile: Decoder(model, compile == "on"))
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda tokens, cache: (
        compiled.append((len(tokens), len(cache.slots))) or model(tokens, cache=cache)))
    generate.main(["--device", "cpu", "--dtype", "fp32", "--compile", "on", "--rounds", "1", "--prompt_tokens", "100",
                   "--max_tokens", "40"])        # 108 tokens would fit a smaller cache than 140
    assert set(compiled) == {(1, 256), (8, 256)}
