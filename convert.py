"""Convert a checkpoint to a Hugging Face folder or to our .pt format.

    python convert.py --checkpoint logs/model_19073.pt --out gpt2-mine     # for transformers, lm-eval
    python convert.py --checkpoint gpt2 --out logs/gpt2.pt                 # OpenAI's weights from the hub
    python convert.py --checkpoint ckpt.pt --out nano.pt                   # nanoGPT's, build-nanogpt's
    python convert.py --checkpoint logs/spam/classifier.pt --out spam      # a classifier, for transformers

Existing files are never overwritten. A Hugging Face folder gets its name only after reading it back gave equal logits.
Where transformers is installed, texts of every kind must have the token ids that the source's own tokenizer gives them.
"""
import exactgpt.launch  # noqa: F401  first, see there

import collections
import functools
import importlib.util
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import save_checkpoint
from exactgpt.config import RunFailed, TokenizerConfig, UserError, command, flag, human_bytes, parse_config, run_script
from exactgpt.files import check_new
from exactgpt.generation import example_prompt
from exactgpt.huggingface import exported_rows, read_pretrained, write_pretrained
from exactgpt.open_model import build_model, open_model
from exactgpt.tokenizer import EOT_TEXT

READ_BY_TRANSFORMERS = ("tokenizer.json", "merges.txt")
SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000"
TEXTS = [
    "", "Hello, I'm a language model,\n\n  d\xe9j\xe0 vu in 2024: \u6771\u4eac <|x|> don't\t!",
    "we'll WE'LL it's IT'S I'd they've 'tis o'clock ''s 're",
    "12345 1,234.50 0x1F 3e-4 \u0663\u0664 \xbd\u2167 1\u20443",
    "def f(x):\n    return {'a': x[1:]}  # ok\n\n\tif (a != b) { i++; }\r\n",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 e\u0301 \u212b \ufb01",
    "\u4eca\u65e5\u306f\u3001\u4e16\u754c\u3002 \uc548\ub155 \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\ufefftext\x00\x1b[0m\u200b\xad",
    "[PAD] [UNK] <s> </s> <pad> <mask> <|user|> <|assistant|> ##ing \u2581the \u0120the"]


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
    opened = open_model(config.checkpoint, classifiers=True, tokenizer=config.tokenizer).without_foreign_tokenizer()
    model, tokenizer = opened.model.eval(), opened.tokenizer
    print(opened.summary())
    if out.suffix != ".pt" and tokenizer and tokenizer.eot is None:
        raise UserError("a Hugging Face folder cannot hold a vocabulary of characters, as transformers has no such "
                        "tokenizer; use --out NAME.pt")
    if tokenizer and opened.folder and any((opened.folder / name).is_file() for name in READ_BY_TRANSFORMERS):
        check_ids(tokenizer, opened.folder, opened.source, "nothing was written")
    if out.suffix == ".pt":
        base = dict(base=opened.base) if opened.base else {}
        save_checkpoint(out, dict(model=model.state_dict(), config=model.config_dict(), step=opened.step,
                                  val_loss=opened.val_loss, tokenizer=tokenizer and tokenizer.to_checkpoint(), **base))
        print(f"wrote {out} ({human_bytes(out.stat().st_size)})")
    else:
        write_pretrained(out, model.config_dict(), model.state_dict(), tokenizer, opened.base,
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
    rows = exported_rows(model.config_dict(), tokenizer)
    ids = torch.randint(rows, (2, min(64, model.config.block_size)), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 0      # because transformers' classifier would take end-of-text there for padding
    expected = model(ids)[..., :rows]                   # (2, T, rows), of a classifier (2, labels)

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
            wanted = wanted[:rows]
        if not torch.equal(wanted.float().view(torch.int32), tensor.view(torch.int32)):   # as bits, because NaN != NaN
            raise RunFailed(f"the export is wrong and was deleted: {name} reads back differently; check the disk")
    results = [check_logits(reread(ids), "our reader")]
    del reread, weights
    if importlib.util.find_spec("transformers"):
        transformers = quiet_transformers()
        classifies = hasattr(model.config, "labels")
        kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(folder).eval()
        results.append(check_logits(theirs(ids).logits, f"transformers {transformers.__version__}"))
        if tokenizer:
            check_ids(tokenizer, folder, "the export", "it was deleted")
    else:
        results.append("transformers is not installed")
    print(f"verified: the weights are bitwise equal; largest difference of logits: {', '.join(results)}")


def quiet_transformers():
    """Return the module transformers, told to print only errors."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_ids(tokenizer, folder, name, consequence):
    """Raise RunFailed unless transformers' tokenizer of a folder, called `name`, gives all sampled texts our ids."""
    if not importlib.util.find_spec("transformers"):
        print(f"token ids: not compared with those of {name}, because transformers is not installed")
        return
    transformers, texts = quiet_transformers(), sample_texts(tokenizer)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        pairs = [*zip(texts, theirs(texts)["input_ids"]), (EOT_TEXT, [theirs.convert_tokens_to_ids(EOT_TEXT)])]
    except Exception as error:      # of any kind
        raise RunFailed(f"transformers cannot use the tokenizer of {name} ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:120]}); {consequence}") from error
    for text, ids in pairs:
        if ids != ([tokenizer.eot] if text == EOT_TEXT else tokenizer.encode(text)):
            raise RunFailed(f"transformers' tokenizer of {name} gives other token ids, for instance for "
                            f"{text[:60]!r}; {consequence}")
    print(f"token ids: equal to those of {name} in {len(texts)} texts of every kind (transformers "
          f"{transformers.__version__})")


@functools.cache
def characters_by_kind():
    """Return [the characters of a category of Unicode in a plane], without the halves of surrogate pairs."""
    kinds = collections.defaultdict(list)
    for character in map(chr, range(0x110000)):
        kinds[unicodedata.category(character), ord(character) >> 16].append(character)
    return [characters for (category, _), characters in kinds.items() if category != "Cs"]


def sample_texts(tokenizer):
    """Return texts of every kind, always the same ones: each kind of character, runs of spaces, tokens in disorder."""
    rng = random.Random(0)
    texts = list(TEXTS)
    for characters in characters_by_kind():
        texts.append("".join(rng.choice(characters) + rng.choice(["", " ", "a", "1", "'s", "!"]) for _ in range(24)))
    for space in SPACES:
        texts += [f"a{space}b{space * 2}c{space * 7}", f"{space}1 {space}!{space}\n{space * 3}x"]
    texts += ["".join(rng.choices(SPACES + "aB1!", weights=[1] * len(SPACES) + [6] * 4, k=60)) for _ in range(20)]
    texts += [tokenizer.decode(rng.choices(range(tokenizer.eot), k=20)) for _ in range(100)]
    return [text for text in texts if EOT_TEXT not in text]      # in ours it is ordinary text


if __name__ == "__main__":
    run_script(main)
