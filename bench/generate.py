"""Measure tokens per second of text generation: our decoder and Hugging Face's generate(), taking turns.

    python -m bench.generate                                   # CPU: batches of 1 and 8
    python -m bench.generate --batch_size 1 --batch_size 32    # one GPU; these are its default sizes

Both have the same random weights and run in one process. They decode greedily with a KV cache, the same number of
tokens after the same prompts; the time includes reading the prompt. transformers runs in the faster of fp32 and the
16-bit dtype. Writes bench/results/generate_{device}_{model}.json.
"""
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from bench.common import comparison_row, describe_machine, median_and_range, write_results
from bench.sizes import SizeConfig
from exactgpt.config import flag, parse_config, run_script
from exactgpt.device import DTYPES, choose_device, choose_dtype, probe_hardware
from exactgpt.generation import generate_ids, make_decoder
from exactgpt.huggingface import write_pretrained
from model import GPT, GPTConfig

N_VOCAB = 50257


@dataclass(kw_only=True)
class GenerateConfig(SizeConfig):
    """The flags of this benchmark."""
    batch_size: list[int] = flag([], "sequences generated at once; may be given several times (default: 1 and 8, on a "
                                 "GPU 1 and 32)",
                                 repeat=True, low=1)
    prompt_tokens: int = flag(32, "tokens in each prompt", low=1)
    max_tokens: int = flag(128, "tokens to generate after each prompt", low=2)
    compile: str = flag(None, "torch.compile for our decoder (default: on for a GPU, auto for a CPU)",
                        choices=("auto", "on", "off"))
    rounds: int = flag(3, "measurements of each way; the medians count", low=1)


def main(argv=None):
    """Time both ways in turn and write the comparison."""
    config = parse_config(GenerateConfig, argv, __doc__.split("\n\n")[0])
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, probe_hardware(device))
    compile = config.compile or ("on" if device.type == "cuda" else "auto")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=N_VOCAB, **config.shape))
    weight_bytes = model.n_params() * DTYPES[dtype].itemsize
    peers = load_peers(model, device, dtype)
    check_equal_work(model, peers["fp32"], config)
    decoder = make_decoder(model, device, DTYPES[dtype], compile)
    results = {}
    for batch_size in config.batch_size or ([1, 32] if device.type == "cuda" else [1, 8]):
        prompts = torch.randint(N_VOCAB, (batch_size, config.prompt_tokens))
        name = fastest_dtype(peers, prompts, config, device)
        ways = {"ours": lambda n, prompts=prompts: our_generate(decoder, prompts, n),
                "transformers": lambda n, prompts=prompts, name=name: transformers_generate(peers[name], prompts, n)}
        results[batch_size] = time_in_turns(ways, batch_size, config, device)
        results[batch_size].update(transformers_dtype=name,
                                   weights_gb_per_s=weight_bytes * results[batch_size]["steps_per_s"] / 1e9)
    write_results(f"generate_{device.type}_{config.name}", dict(
        machine=describe_machine(), config=vars(config), compile=compile, dtype=dtype, threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0], batches=results), [
            comparison_row(f"generation, {config.name}, batch {n}", "tokens/s", r["tokens_per_s"]["ours"][0],
                           f"transformers ({r['transformers_dtype']})", r["tokens_per_s"]["transformers"][0])
            for n, r in results.items()])
    print("| batch | ours, tokens/s | transformers | ratio | ratio of CPU time |\n|---|---|---|---|---|")
    for batch_size, r in results.items():
        print(f"| {batch_size} | {r['tokens_per_s']['ours'][0]:,.0f} | {r['tokens_per_s']['transformers'][0]:,.0f} "
              f"({r['transformers_dtype']}) | {r['ratio']:.2f} | {r['cpu_ratio']:.2f} |")


def load_peers(model, device, dtype):
    """Return {dtype name: transformers model} with our model's weights, in fp32 and in the given dtype."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_pretrained(f"{folder}/hf", model.config_dict(), model.state_dict())
        return {name: transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf").to(device, DTYPES[name]).eval()
                for name in {"fp32", dtype}}


def check_equal_work(model, peer, config):
    """Raise AssertionError unless both generate the same tokens in fp32."""
    prompts = torch.randint(N_VOCAB, (2, config.prompt_tokens))
    model.to(peer.device).eval()
    n = min(8, config.max_tokens)
    steps = list(generate_ids(model, prompts.tolist(), n_vocab=N_VOCAB, max_tokens=n, temperature=0))
    assert torch.equal(torch.tensor(steps).t(), transformers_generate(peer, prompts, n).cpu()), "the texts differ"


def our_generate(decoder, prompts, n):
    """Generate n tokens after each prompt (B, T) with our decoder."""
    for _ in generate_ids(decoder, prompts.tolist(), n_vocab=N_VOCAB, max_tokens=n, temperature=0):
        pass


def transformers_generate(peer, prompts, n):
    """Generate n tokens after each prompt (B, T) with transformers; return (B, n)."""
    prompts = prompts.to(peer.device)
    return peer.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=n,
                         min_new_tokens=n, use_cache=True, pad_token_id=0)[:, prompts.size(1):]


def fastest_dtype(peers, prompts, config, device):
    """Return the name of the dtype in which transformers is fastest for these prompts."""
    n, seconds = min(24, config.max_tokens), {}
    for name, peer in peers.items():
        transformers_generate(peer, prompts, 2)
        seconds[name] = min(time_action(lambda peer=peer: transformers_generate(peer, prompts, n), device)
                            for _ in range(2))
    return min(seconds, key=seconds.get)


def time_in_turns(ways, batch_size, config, device):
    """Time the ways in turn; return medians, ranges and ratios as a dict."""
    for way in ways.values():
        way(config.max_tokens)         # warm up with the timed length: ours compiles once per cache size
    tokens = batch_size * config.max_tokens
    seconds, cpu_seconds = ({name: [] for name in ways} for _ in range(2))
    for i in range(config.rounds):
        for name, way in list(ways.items())[::1 if i % 2 == 0 else -1]:
            took, cpu = time_action(lambda way=way: way(config.max_tokens), device)
            seconds[name].append(took)
            cpu_seconds[name].append(cpu)
            print(f"batch {batch_size:3d}  {name:>12}  {tokens / took:10,.1f} tokens/s", flush=True)

    def rates(values):
        return {name: median_and_range([tokens / s for s in values[name]]) for name in ways}

    def ratio(values):
        return statistics.median(values["transformers"]) / statistics.median(values["ours"])
    return dict(tokens_per_s=rates(seconds), tokens_per_cpu_s=rates(cpu_seconds), ratio=ratio(seconds),
                cpu_ratio=ratio(cpu_seconds),
                steps_per_s=config.max_tokens / statistics.median(seconds["ours"]))


def time_action(action, device):
    """Return (seconds, CPU seconds) that an action takes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu_begin


if __name__ == "__main__":
    run_script(main)
