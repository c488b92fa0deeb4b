"""Turn FineWeb-Edu, or any other text data set on the Hugging Face hub, into token shards.

    python prepare_fineweb.py                                  # 10B tokens, 100 shards in data/edu_fineweb10B
    python prepare_fineweb.py --max_tokens 10000000            # a quick first try
    python prepare_fineweb.py --dataset Skylion007/openwebtext --out data/openwebtext
    python prepare_fineweb.py --data_files 'fineweb/*.parquet' # files that are already on this disk
    python prepare_fineweb.py --verify                         # only verify existing shards

Source files are downloaded one at a time, and only their text column is read. If the script is killed, run the same
command again: the manifest records where in the source the next shard begins.
"""
import exactgpt.launch  # noqa: F401  first, see there

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from exactgpt.config import TokenizerConfig, UserError, counted, flag, human_bytes, parse_config, run_script
from exactgpt.documents import RESUMABLE, read_texts
from exactgpt.files import reading
from exactgpt.hub import download_source_file, resolve_dataset
from exactgpt.shard_writer import encode_in_order, prepare_folder, write_shards
from exactgpt.shards import Manifest, ShardFolder
from exactgpt.tokenizer import default_tokenizer, require_end_of_text

HUB_NOTES = ".cache/huggingface"     # of huggingface_hub, in the folder of downloads
FINEWEB_EDU, SAMPLE_10BT = "HuggingFaceFW/fineweb-edu", "sample-10BT"


@dataclass(kw_only=True)
class PrepareFinewebConfig(TokenizerConfig):
    """The flags of prepare_fineweb.py."""
    dataset: str = flag(FINEWEB_EDU, "data set on the Hugging Face hub", group="source")
    name: str | None = flag(None, "configuration of the data set, such as sample-100BT or CC-MAIN-2024-10 (default: "
                                  "sample-10BT for FineWeb-Edu, otherwise the data set's own default)")
    text_column: str = flag("text", "column that holds the text")
    data_files: str = flag("", "read local parquet or jsonl files instead of the hub: a quoted pattern such as "
                               "'dir/*.parquet'")
    out: str | None = flag(None, "output folder (default: data/edu_fineweb10B; for another data set data/DATASET)",
                           group="shards")
    shard_tokens: int = flag(100_000_000, "tokens per shard", low=1, high=2_000_000_000)
    max_tokens: int | None = flag(None, "stop after N tokens (default: the whole source)", low=20)
    num_proc: int | None = flag(None, "tokenizer threads (default: one per core; 0 is 1)", group="system", low=0,
                                high=1024)
    keep_downloads: bool = flag(False, "keep the downloaded source files in OUT/downloads")
    verify: bool = flag(False, "only verify existing shards: file hashes, sizes and token ids")

    def with_defaults(self):
        """Return a copy with the defaults filled in that depend on other flags."""
        is_fineweb = self.dataset == FINEWEB_EDU
        name = self.name or (SAMPLE_10BT if is_fineweb and not self.data_files else None)
        named = "_".join(filter(None, [self.prefix(), name]))
        out = "data/edu_fineweb10B" if is_fineweb and name in (None, SAMPLE_10BT) else f"data/{_slug(named)}"
        return dataclasses.replace(self, name=name, out=self.out or out)

    def prefix(self):
        """Return the prefix of shard names. For FineWeb-Edu it is the one build-nanogpt uses."""
        return "edufineweb" if self.dataset == FINEWEB_EDU else _slug(self.dataset.split("/")[-1])

    def val_tokens(self):
        """Return the size of the validation shard: --shard_tokens, or a tenth of --max_tokens if that is less."""
        return min(self.shard_tokens, (self.max_tokens or 10 * self.shard_tokens) // 10)


def _slug(text):
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.-") or "data"


def resolve_source_files(config, manifest):
    """List the source files in a new manifest, or check that those of an existing one are unchanged."""
    if config.data_files:
        paths = sorted(p for p in glob.glob(config.data_files, recursive=True) if Path(p).is_file())
        if not paths:
            raise UserError(f"--data_files {config.data_files}: no file matches")
        files = []
        for path in paths:
            if not path.endswith(RESUMABLE):
                raise UserError(f"--data_files: cannot read {path}: it must end in one of {', '.join(RESUMABLE)}")
            # Fail now, not hours later, if a parquet file is damaged or lacks the column.
            next(read_texts(path, config.text_column), None)
            with reading(path):
                files.append(dict(path=path, size=Path(path).stat().st_size, sha256=""))
        if manifest.files not in ([], files):
            raise UserError(f"the files of --data_files {config.data_files} changed since {config.out} was started; "
                            "restore them or choose another --out")
        manifest.files = files
    elif not manifest.files:        # pinned to a commit, so a continued run does not ask the hub again
        manifest.revision, manifest.files = resolve_dataset(config.dataset, config.name)
    if set(manifest.position) != {"file", "start", "skip"} or manifest.position["file"] >= len(manifest.files):
        raise UserError(f"{config.out}/manifest.json is damaged (entry 'position'); delete {config.out} and start over")


def iter_documents(config, manifest):
    """Yield (position, text, True) for the documents from the manifest's position on, downloading what is needed."""
    def download(file):
        return download_source_file(config.dataset, manifest.revision, file, Path(config.out, "downloads"))

    first, following = manifest.position["file"], None
    for i, file in enumerate(manifest.files[first:], first):
        path = file["path"] if config.data_files else (following or _run_in_thread(download, file)).result()
        begin, following = manifest.position["start"] if i == first else 0, None
        for start, text in read_texts(path, config.text_column, begin):
            # No prefetch with --max_tokens: the next file may never be needed.
            if not (following or config.data_files or config.max_tokens) and i + 1 < len(manifest.files):
                following = _run_in_thread(download, manifest.files[i + 1])
            yield {"file": i, "start": start}, text, True


def _run_in_thread(function, argument):
    """Return a Future of function(argument), computed in a daemon thread."""
    # Not a ThreadPoolExecutor: Python waits for its threads at exit, so Ctrl-C would hang until the download ends.
    future = Future()

    def work():
        try:
            future.set_result(function(argument))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future


def tokenize(config, manifest, tokenizer):
    """Yield (position, tokens) from the manifest's position to the end of the source or --max_tokens."""
    done = sum(entry["tokens"] for entry in manifest.shards)
    skip, first = manifest.position["skip"], manifest.position["file"]
    n_threads = 1 if config.num_proc == 0 else config.num_proc
    with tqdm(desc="tokenizing", initial=done, total=config.max_tokens, unit="tok", unit_scale=True, disable=None,
              smoothing=0.05) as bar:
        for position, tokens in encode_in_order(iter_documents(config, manifest), tokenizer, n_threads):
            if not (config.data_files or config.keep_downloads):
                delete_files(Path(config.out, "downloads"), manifest.files[first:position["file"]])    # read to the end
                first = position["file"]
            dropped = min(skip, len(tokens))        # these are already in finished shards
            skip -= dropped
            tokens = tokens[dropped:][:config.max_tokens and config.max_tokens - done]
            n_shards = len(manifest.shards)
            yield {**position, "skip": dropped}, tokens
            done += len(tokens)
            bar.update(len(tokens))
            for entry in manifest.shards[n_shards:]:
                bar.write(f"wrote {entry['file']} (at source file {position['file'] + 1} of {len(manifest.files)})")
            if done == config.max_tokens:
                break
    if done <= config.val_tokens():
        raise UserError(f"the source ends after {counted(done, 'token')}, inside the validation shard of "
                        f"{config.val_tokens():,}; use a smaller --shard_tokens, or set --max_tokens (a tenth of it "
                        "becomes validation)")


def verify_shards(folder, tokenizer=""):
    """Check every shard's size, hash and token ids. tokenizer: the flag. Raises UserError at the first error."""
    shards = ShardFolder(folder, need_complete=False)
    n_vocab = shards.tokenizer(tokenizer).n_vocab
    n_bytes = sum(2 * s.n_tokens for s in shards.shards)
    with tqdm(desc="verifying", total=n_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        shards.verify(n_vocab, bar.update)
    result = "hashes, sizes and token ids are correct" if shards.manifest else \
        "sizes and token ids are correct; hashes not checked, there is no manifest.json"
    print(f"{folder}: {counted(len(shards.shards), 'shard')}, {counted(n_bytes // 2, 'token')}: {result}")
    if shards.manifest and not shards.manifest.complete:
        print(f"{folder} is incomplete; run the same prepare command again to complete it")


def delete_files(folder, files):
    """Delete downloaded files, entries of the manifest. Their paths come from a file, and must not lead elsewhere."""
    for file in files:
        path = folder / file["path"]
        if folder.resolve() in path.parent.resolve().joinpath(path.name).parents:
            path.unlink(missing_ok=True)


def delete_downloads(folder, files):
    """Delete the downloaded files and the hub's notes on them; leave whatever else has been put into the folder."""
    delete_files(folder, files)
    shutil.rmtree(folder / HUB_NOTES, ignore_errors=True)
    for here, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):      # not empty
            os.rmdir(here)


def make_shards(config, manifest, tokenizer):
    """Write the vocabulary, then the shards from the manifest's position on."""
    downloads = Path(config.out, "downloads")
    if downloads.is_symlink():
        raise UserError(f"{downloads} is a link, which is not followed; delete it, or link {config.out} instead")
    manifest.save(config.out)
    tokenizer.save(config.out)
    for leftover in (downloads / HUB_NOTES).rglob("*.incomplete"):      # of a process that was killed
        leftover.unlink()
    if manifest.shards:
        ShardFolder(config.out, need_complete=False)        # raises if the shards to continue from are damaged
    at = f" at commit {manifest.revision[:12]}" if manifest.revision else ""
    resumed = f", continuing after shard {len(manifest.shards) - 1}" if manifest.shards else ""
    size = human_bytes(sum(f["size"] for f in manifest.files))
    print(f"{manifest.source}{at}: {counted(len(manifest.files), 'file')}, {size}{resumed}", flush=True)
    with contextlib.closing(tokenize(config, manifest, tokenizer)) as pieces:
        write_shards(config.out, config.prefix(), manifest, pieces, config.val_tokens(), config.shard_tokens)
    if not (config.data_files or config.keep_downloads):
        delete_downloads(downloads, manifest.files)


def main(argv=None):
    """Make or verify shards. argv: the flags (default: sys.argv). Raises UserError for user mistakes."""
    config = parse_config(PrepareFinewebConfig, argv, description=__doc__.split("\n\n")[0]).with_defaults()
    if config.verify:
        return verify_shards(config.out, config.tokenizer)
    # Every file is downloaded once, so Xet's chunk cache would only double the disk space.
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
    tokenizer = require_end_of_text(default_tokenizer(config.tokenizer), "preparing text")
    compared = ("dataset", "name", "text_column", "data_files", "shard_tokens", "max_tokens")
    source = f"files {config.data_files}" if config.data_files else f"{config.dataset} {config.name or ''}".strip()
    wanted = Manifest(source=source, tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, eot=tokenizer.eot,
                      settings={k: getattr(config, k) for k in compared}, position={"file": 0, "start": 0, "skip": 0})
    prepare_folder(config.out, wanted, lambda manifest: make_shards(config, manifest, tokenizer),
                   check=lambda manifest: resolve_source_files(config, manifest))


if __name__ == "__main__":
    run_script(main)
