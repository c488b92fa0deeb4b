"""Convert a checkpoint to a Hugging Face folder or to our .pt format.

    python convert.py --checkpoint logs/model_19073.pt --out gpt2-mine     # for transformers, lm-eval
    python convert.py --checkpoint gpt2 --out logs/gpt2.pt                 # OpenAI's weights from the hub
    python convert.py --checkpoint ckpt.pt --out nano.pt                   # nanoGPT's, build-nanogpt's
    python convert.py --checkpoint logs/spam/classifier.pt --out spam      # a classifier, for transformers

Existing files are never overwritten. A Hugging Face folder gets its name only after reading it back gave equal logits.
"""
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import save_checkpoint
from exactgpt.classifier import Classifier
from exactgpt.config import RunFailed, TokenizerConfig, check_new, flag, human_bytes, parse_config, run_script
from exactgpt.open_model import build_model, newest_model, open_model, read_pretrained, write_pretrained

TEST_TEXT = "Hello, I'm a language model,\n\n  déjà vu in 2024: 東京 <|x|> don't\t!"


@dataclass(kw_only=True)
class ConvertConfig(TokenizerConfig):
    """The flags of this script."""
    checkpoint: str = flag("", "model to convert: model_XXXXX.pt, a Hugging Face folder or a hub name such as gpt2 "
                               "(default: the newest model below logs/)", group="files")
    out: str = flag(help="what to write: a new folder in Hugging Face format, or NAME.pt in our format (required)",
                    group="files")


def main(argv=None):
    """Convert the checkpoint named by the flags (sys.argv, or argv). Raises UserError for user mistakes."""
    config = parse_config(ConvertConfig, argv, __doc__.splitlines()[0])
    out = Path(config.out)
    check_new(out, folder=out.suffix != ".pt")
    opened = open_model(config.checkpoint or newest_model(), classifiers=True, tokenizer=config.tokenizer)
    opened.model.eval()
    classifies = isinstance(opened.model, Classifier)
    print(opened.summary())
    if out.suffix == ".pt":
        write_pt_file(out, opened)
    else:
        write_pretrained(out, opened.model.config_dict(), opened.model.state_dict(), opened.tokenizer,
                         check=lambda folder: verify_export(folder, opened))
        files = sorted(out.iterdir())
        size = human_bytes(sum(f.stat().st_size for f in files))
        print(f"wrote {out} ({size}): {', '.join(f.name for f in files)}")
    if opened.tokenizer is None:
        print("note: the checkpoint has no tokenizer, so the converted model reads and writes only token ids")
    else:
        script, text = ("finetune_classifier.py", "--predict") if classifies else ("inference.py", "--prompt")
        print(f'next: python {script} --checkpoint {out} {text} "..."')
        if out.suffix != ".pt":
            print(f'or in Python: transformers.pipeline("text-{"classification" if classifies else "generation"}", '
                  f'"{out}")')


def write_pt_file(path, opened):
    """Write an opened model as a checkpoint in our format."""
    entries = dict(model=opened.model.state_dict(), config=opened.model.config_dict(), step=opened.step,
                   val_loss=opened.val_loss, tokenizer=opened.tokenizer.to_checkpoint() if opened.tokenizer else None)
    if "base" in opened.extra:      # the model that it was fine-tuned from
        entries["base"] = opened.extra["base"]
    save_checkpoint(path, entries)
    print(f"wrote {path} ({human_bytes(path.stat().st_size)})")


@torch.no_grad()
def verify_export(folder, opened):
    """Read an export back with our reader and, if installed, transformers; compare it and print the result.

    Raises RunFailed if weights differ at all, logits by more than rounding, or a text's token ids at all.
    """
    print("written; comparing it with the original ...", flush=True)
    model, tokenizer = opened.model, opened.tokenizer
    n_vocab = tokenizer.n_vocab if tokenizer else model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(n_vocab, (2, min(64, model.config.block_size)), generator=generator)
    ids[:, -1] = 0      # because transformers' classifier would take end-of-text there for padding
    logits = model(ids)[..., :n_vocab]                  # (2, T, n_vocab), of a classifier (2, labels)
    reread = build_model(*read_pretrained(folder), folder).eval()
    check_weights(model, reread, n_vocab)
    results = [f"{max_logit_difference(logits, reread(ids), 'our reader'):.1e} with our reader"]
    del reread
    if importlib.util.find_spec("transformers"):
        results.append(verify_with_transformers(folder, ids, logits, tokenizer))
    else:
        results.append("transformers is not installed")
    print(f"verified: the weights are bitwise equal; largest difference of logits: {', '.join(results)}")


def check_weights(model, reread, n_vocab):
    """Raise RunFailed unless the reread weights equal the model's bit by bit; absent biases count as zeros."""
    expected = model.state_dict()
    for name, tensor in reread.state_dict().items():
        wanted = expected[name] if name in expected else torch.zeros_like(tensor)
        if name in ("transformer.wte.weight", "lm_head.weight"):
            wanted = wanted[:n_vocab]
        if not torch.equal(wanted.float().view(torch.int32), tensor.view(torch.int32)):   # as bits, because NaN != NaN
            raise RunFailed(f"the export is wrong and was deleted: {name} reads back differently; check the disk")


def max_logit_difference(expected, logits, reader):
    """Return the largest difference of two tensors of logits. Raises RunFailed if it is more than rounding."""
    rounding = 1e-5 + 1e-4 * expected.abs().nan_to_num().max().item()
    largest = (expected - logits).abs().max().item()
    if not torch.allclose(expected, logits, rtol=0, atol=rounding, equal_nan=True):
        raise RunFailed(f"the export is wrong and was deleted: the logits of {reader} differ by {largest:.1e}")
    return largest


def verify_with_transformers(folder, ids, logits, tokenizer):
    """Compare an export as transformers reads it; return the result in words. Raises RunFailed if it differs."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if logits.dim() == 3 else transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(folder).eval()
    largest = max_logit_difference(logits, theirs(ids).logits, "transformers")
    result = f"{largest:.1e} with transformers {transformers.__version__}"
    if tokenizer:
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids_differ = their_tokenizer(TEST_TEXT)["input_ids"] != tokenizer.encode(TEST_TEXT)
        if ids_differ or their_tokenizer.eos_token_id != tokenizer.eot:
            raise RunFailed("the export is wrong and was deleted: transformers' tokenizer gives other token ids")
        result += " (same token ids)"
    return result


if __name__ == "__main__":
    run_script(main)
