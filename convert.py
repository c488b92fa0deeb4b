"""Convert a checkpoint to a Hugging Face folder or to our .pt format.

    python convert.py --checkpoint logs/model_19073.pt --out gpt2-mine     # for transformers, lm-eval
    python convert.py --checkpoint gpt2 --out logs/gpt2.pt                 # OpenAI's weights from the hub
    python convert.py --checkpoint ckpt.pt --out nano.pt                   # nanoGPT's, build-nanogpt's
    python convert.py --checkpoint logs/spam/classifier.pt --out spam      # a classifier, for transformers

Existing files are never overwritten. A Hugging Face folder gets its name only after reading it back gave equal logits.
"""
import exactgpt.launch  # noqa: F401  first, see there

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import (
    RunFailed,
    TokenizerConfig,
    UserError,
    check_new,
    command,
    flag,
    human_bytes,
    parse_config,
    run_script,
)
from exactgpt.generation import example_prompt
from exactgpt.open_model import build_model, open_model, read_pretrained, write_pretrained

TEST_TEXT = "Hello, I'm a language model,\n\n  déjà vu in 2024: 東京 <|x|> don't\t!"


@dataclass(kw_only=True)
class ConvertConfig(TokenizerConfig):
    """The flags of this script."""
    checkpoint: str = flag("", "model to convert: model_XXXXX.pt, a Hugging Face folder or a hub name such as gpt2 "
                               "(default: the newest model below logs/)", group="files")
    out: str = flag(help="a new folder for Hugging Face format, or NAME.pt for our format (required)")


def main(argv=None):
    """Convert the checkpoint named by the flags (sys.argv, or argv). Raises UserError for user mistakes."""
    config = parse_config(ConvertConfig, argv, __doc__.splitlines()[0])
    out = Path(config.out)
    check_new(out, folder=out.suffix != ".pt")
    opened = open_model(config.checkpoint, classifiers=True, tokenizer=config.tokenizer)
    model, tokenizer = opened.model.eval(), opened.tokenizer
    print(opened.summary())
    if out.suffix != ".pt" and tokenizer and tokenizer.eot is None:
        raise UserError("a Hugging Face folder cannot hold a vocabulary of characters, as transformers has no such "
                        "tokenizer; use --out NAME.pt")
    if out.suffix == ".pt":
        base = dict(base=opened.base) if opened.base else {}
        save_checkpoint(out, dict(model=model.state_dict(), config=model.config_dict(), step=opened.step,
                                  val_loss=opened.val_loss, tokenizer=tokenizer and tokenizer.to_checkpoint(), **base))
        print(f"wrote {out} ({human_bytes(out.stat().st_size)})")
    else:
        write_pretrained(out, model.config_dict(), model.state_dict(), tokenizer,
                         check=lambda folder: verify_export(folder, model, tokenizer))
        files = sorted(out.iterdir())
        size = human_bytes(sum(f.stat().st_size for f in files))
        print(f"wrote {out} ({size}): {', '.join(f.name for f in files)}")
    if tokenizer is None:
        print("note: the checkpoint has no tokenizer, so the converted model reads and writes only token ids")
        return
    script, text, task = (("finetune_classifier.py", "--predict", "classification") if hasattr(model.config, "labels")
                          else ("inference.py", "--prompt", "generation"))
    print("next: " + command(script, "--checkpoint", out, text, example_prompt(tokenizer)))
    if out.suffix != ".pt":
        print(f'or in Python: transformers.pipeline("text-{task}", {str(out)!r})')


@torch.no_grad()
def verify_export(folder, model, tokenizer):
    """Raise RunFailed if our reader or transformers (if installed) reads something else than was exported."""
    print("written; comparing it with the original ...", flush=True)
    n_vocab = tokenizer.n_vocab if tokenizer else model.config.vocab_size
    ids = torch.randint(n_vocab, (2, min(64, model.config.block_size)), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 0      # because transformers' classifier would take end-of-text there for padding
    expected = model(ids)[..., :n_vocab]                # (2, T, n_vocab), of a classifier (2, labels)

    def check_logits(logits, reader):
        rounding = 1e-5 + 1e-4 * expected.abs().nan_to_num().max().item()
        largest = (expected - logits).abs().max().item()
        if not torch.allclose(expected, logits, rtol=0, atol=rounding, equal_nan=True):
            raise RunFailed(f"the export is wrong and was deleted: the logits of {reader} differ by {largest:.1e}")
        return f"{largest:.1e} with {reader}"

    reread, weights = build_model(*read_pretrained(folder), folder).eval(), model.state_dict()
    for name, tensor in reread.state_dict().items():
        wanted = weights.get(name, torch.zeros_like(tensor))            # absent biases count as zeros
        if name in ("transformer.wte.weight", "lm_head.weight"):
            wanted = wanted[:n_vocab]
        if not torch.equal(wanted.float().view(torch.int32), tensor.view(torch.int32)):   # as bits, because NaN != NaN
            raise RunFailed(f"the export is wrong and was deleted: {name} reads back differently; check the disk")
    results = [check_logits(reread(ids), "our reader")]
    del reread, weights
    if importlib.util.find_spec("transformers"):
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        classifies = hasattr(model.config, "labels")
        kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(folder).eval()
        results.append(check_logits(theirs(ids).logits, f"transformers {transformers.__version__}"))
        if tokenizer:
            reader = transformers.AutoTokenizer.from_pretrained(folder)
            if (reader(TEST_TEXT)["input_ids"], reader.eos_token_id) != (tokenizer.encode(TEST_TEXT), tokenizer.eot):
                raise RunFailed("the export is wrong and was deleted: transformers' tokenizer gives other token ids")
            results[-1] += " (same token ids)"
    else:
        results.append("transformers is not installed")
    print(f"verified: the weights are bitwise equal; largest difference of logits: {', '.join(results)}")


if __name__ == "__main__":
    run_script(main)
