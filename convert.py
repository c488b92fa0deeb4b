"""Convert a checkpoint: any that is read here into a Hugging Face folder, or into a .pt file of ours.

    python convert.py --checkpoint logs/model_19073.pt --out gpt2-mine     # for transformers, lm-eval
    python convert.py --checkpoint gpt2 --out logs/gpt2.pt                 # OpenAI's weights from the hub
    python convert.py --checkpoint ckpt.pt --out nano.pt                   # nanoGPT's, build-nanogpt's
    python convert.py --checkpoint logs/spam/classifier.pt --out spam      # a classifier, for transformers

Nothing is written over, and an export has its name only after it was read back and gave the same logits.
"""
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import save_checkpoint
from exactgpt.classifier import Classifier
from exactgpt.config import RunFailed, TokenizerConfig, UserError, flag, human_bytes, parse_config, run_script
from exactgpt.open_model import build_model, newest_model, open_model, read_pretrained, write_pretrained

PROBE_TEXT = "Hello, I'm a language model,\n\n  déjà vu in 2024: 東京 <|x|> don't\t!"


@dataclass(kw_only=True)
class ConvertConfig(TokenizerConfig):
    """The flags of this script."""
    checkpoint: str = flag("", "model_XXXXX.pt, a Hugging Face folder or a name such as gpt2 "
                               "(default: the newest below logs/)", group="files")
    out: str = flag(help="a new folder for Hugging Face's format, a new file NAME.pt for ours (required)",
                    group="files")


def main(argv=None):
    """Convert as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(ConvertConfig, argv, __doc__.splitlines()[0])
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and out.suffix != ".pt" and not any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or move it away")
    opened = open_model(config.checkpoint or newest_model(), classifiers=True, tokenizer=config.tokenizer)
    opened.model.eval()
    classifies = isinstance(opened.model, Classifier)
    print(opened.describe())
    if out.suffix == ".pt":
        write_ours(out, opened)
    else:
        write_pretrained(out, opened.model.config_dict(), opened.model.state_dict(), opened.tokenizer,
                         check=lambda folder: verify(folder, opened))
        files = sorted(out.iterdir())
        size = human_bytes(sum(f.stat().st_size for f in files))
        print(f"wrote {out} ({size}): {', '.join(f.name for f in files)}")
    if opened.tokenizer is None:
        print("there was no tokenizer to take along: the model reads and writes ids")
    else:
        script, text = ("finetune_classifier.py", "--predict") if classifies else ("inference.py", "--prompt")
        print(f'next: python {script} --checkpoint {out} {text} "..."')
        if out.suffix != ".pt":
            print(f'or in Python: transformers.pipeline("text-{"classification" if classifies else "generation"}", '
                  f'"{out}")')


def write_ours(path, opened):
    """Write an opened model as a checkpoint of ours."""
    entries = dict(model=opened.model.state_dict(), config=opened.model.config_dict(), step=opened.step,
                   val_loss=opened.val_loss, tokenizer=opened.tokenizer.to_checkpoint() if opened.tokenizer else None)
    if "base" in opened.extra:      # what it was fine-tuned from
        entries["base"] = opened.extra["base"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, entries)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"wrote {path} ({human_bytes(path.stat().st_size)})")


@torch.no_grad()
def verify(folder, opened):
    """Read an export back, with our reader and with transformers where it is installed; print what was compared.

    Raises RunFailed where anything differs: weights by a bit, logits by more than rounding, ids of a text at all.
    """
    print("written; comparing it with the original ...", flush=True)
    model, tokenizer = opened.model, opened.tokenizer
    n_vocab = tokenizer.n_vocab if tokenizer else model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(n_vocab, (2, min(64, model.config.block_size)), generator=generator)
    ids[:, -1] = 0      # end-of-text there would be padding to a classifier in transformers
    logits = model(ids)[..., :n_vocab]                  # (2, T, n_vocab), of a classifier (2, labels)
    reread = build_model(*read_pretrained(folder), folder).eval()
    compare_weights(model, reread, n_vocab)
    found = [f"ours to {difference(logits, reread(ids), 'our reader'):.1e}"]
    del reread
    if importlib.util.find_spec("transformers"):
        found.append(verify_with_transformers(folder, ids, logits, tokenizer))
    else:
        found.append("transformers is not installed here")
    print(f"checked: the weights come back bit for bit; largest difference of logits: {', '.join(found)}")


def compare_weights(model, reread, n_vocab):
    """Raise RunFailed unless the weights that were read are the model's; absent biases are zeros."""
    expected = model.state_dict()
    for name, tensor in reread.state_dict().items():
        wanted = expected[name] if name in expected else torch.zeros_like(tensor)
        if name in ("transformer.wte.weight", "lm_head.weight"):
            wanted = wanted[:n_vocab]
        if not torch.equal(wanted.float().view(torch.int32), tensor.view(torch.int32)):   # as bits: NaN is NaN
            raise RunFailed(f"the export was not kept: {name} did not come back as it was written; is the disk sound?")


def difference(expected, logits, reader):
    """The largest difference of two tensors of logits. Raises RunFailed if it is more than rounding."""
    rounding = 1e-5 + 1e-4 * expected.abs().nan_to_num().max().item()
    largest = (expected - logits).abs().max().item()
    if not torch.allclose(expected, logits, rtol=0, atol=rounding, equal_nan=True):
        raise RunFailed(f"the export was not kept: the logits of {reader} differ by {largest:.1e}")
    return largest


def verify_with_transformers(folder, ids, logits, tokenizer):
    """What transformers makes of an export, in words. Raises RunFailed where it differs."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if logits.dim() == 3 else transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(folder).eval()
    words = f"transformers {transformers.__version__} to {difference(logits, theirs(ids).logits, 'transformers'):.1e}"
    if tokenizer:
        read = transformers.AutoTokenizer.from_pretrained(folder)
        if read(PROBE_TEXT)["input_ids"] != tokenizer.encode(PROBE_TEXT) or read.eos_token_id != tokenizer.eot:
            raise RunFailed("the export was not kept: transformers' tokenizer gives other ids")
        words += ", its tokenizer gives our ids"
    return words


if __name__ == "__main__":
    run_script(main)
