"""FineWeb-Edu, or any text data set of the Hugging Face hub, to token shards.

    python prepare_fineweb.py                                  # 10B tokens, 100 shards in data/edu_fineweb10B
    python prepare_fineweb.py --max_tokens 10000000            # a first try
    python prepare_fineweb.py --dataset Skylion007/openwebtext --out data/openwebtext
    python prepare_fineweb.py --data_files 'fineweb/*.parquet' # the same files on disk
    python prepare_fineweb.py --verify                         # read every token of the shards again

One source file at a time, of which only the text column is read. Killed at any moment, the same command continues:
the manifest says where the next shard begins in the source.
"""
import concurrent.futures
import contextlib
import dataclasses
import glob
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from exactgpt.config import FolderLock, UserError, flag, human_bytes, parse_config, run_script
from exactgpt.documents import plan_reads
from exactgpt.hub import FORMATS, SourceFile, download, resolve_dataset
from exactgpt.shard_writer import ShardWriter, available_cpus, encode_tasks, matching_manifest, print_shards, writing_to
from exactgpt.shards import Manifest, ShardFolder
from exactgpt.tokenizer import default_tokenizer

FINEWEB_EDU, SAMPLE_10BT = "HuggingFaceFW/fineweb-edu", "sample-10BT"


@dataclass(kw_only=True)
class Config:
    """Every flag of this script."""
    dataset: str = flag(FINEWEB_EDU, "data set of the hub", group="source")
    name: str | None = flag(None, "its configuration, such as sample-100BT or CC-MAIN-2024-10 (default: sample-10BT "
                            "for FineWeb-Edu, else the data set's own default)", group="source")
    text_column: str = flag("text", "the column that holds the text", group="source")
    data_files: str = flag("", "parquet or jsonl files on this disk instead of the hub: a quoted pattern such as "
                           "'dir/*.parquet'", group="source")
    out: str | None = flag(None, "folder of the shards (default: data/edu_fineweb10B, or one named after the data "
                           "set)", group="shards")
    shard_tokens: int = flag(100_000_000, "tokens in a shard", group="shards", low=1, high=2_000_000_000)
    max_tokens: int | None = flag(None, "stop after N tokens (default: the whole source)", group="shards", low=20)
    tokenizer: str = flag("", "folder whose vocab.bpe and encoder.json encode the text, such as one with shards "
                          "(default: GPT-2's vocabulary)", group="shards")
    num_proc: int | None = flag(None, "tokenising processes, 0 for none but this one (default: one a core)",
                                group="system", low=0, high=1024)
    keep_downloads: bool = flag(False, "keep the source files in OUT/downloads", group="system")
    verify: bool = flag(False, "make nothing: hold every token of the shards against hashes and vocabulary",
                        group="system")

    def check(self):
        """Choose what is left open."""
        is_fineweb = self.dataset == FINEWEB_EDU
        if self.name is None and is_fineweb and not self.data_files:
            self.name = SAMPLE_10BT
        if self.out is None:
            named = [self.prefix(), self.name or ""]
            is_default = is_fineweb and self.name in (None, SAMPLE_10BT)
            self.out = "data/edu_fineweb10B" if is_default else f"data/{_slug('_'.join(filter(None, named)))}"
        if self.num_proc is None:
            self.num_proc = available_cpus()

    def prefix(self):
        """What the shards' names begin with; build-nanogpt's for its data set."""
        return "edufineweb" if self.dataset == FINEWEB_EDU else _slug(self.dataset.split("/")[-1])

    def val_tokens(self):
        """The validation shard has the size of the others, or a tenth of a small corpus."""
        return min(self.shard_tokens, (self.max_tokens or 10 * self.shard_tokens) // 10)


def _slug(text):
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.-") or "data"


def new_manifest(config, tokenizer):
    """The manifest that this command begins with; `matching_manifest` compares its settings."""
    kept = ("dataset", "name", "text_column", "data_files", "shard_tokens", "max_tokens")
    settings = {k: getattr(config, k) for k in kept}
    source = f"files {config.data_files}" if config.data_files else f"{config.dataset} {config.name or ''}".strip()
    return Manifest(source=source, tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, eot=tokenizer.eot,
                    settings=settings, position={"file": 0, "start": 0, "skip": 0})


def find_sources(config, manifest):
    """Write into a new manifest which source files there are; of an old one, hold them against those on this disk.

    The hub's are pinned to a commit at the first start and never asked for again. Raises UserError.
    """
    if config.data_files:
        files = [dataclasses.asdict(f) for f in local_files(config.data_files)]
        if manifest.files not in ([], files):
            raise UserError(f"the files behind --data_files {config.data_files} changed since {config.out} was begun; "
                            "restore them or choose another --out")
        manifest.files = files
        for f in files:
            next(plan_reads(f["path"], config.text_column), None)       # is it parquet, has it the column?
    elif not manifest.files:
        manifest.revision, files = resolve_dataset(config.dataset, config.name)
        manifest.files = [dataclasses.asdict(f) for f in files]
    if set(manifest.position) != {"file", "start", "skip"} or manifest.position["file"] >= len(manifest.files):
        raise UserError(f"{config.out}/manifest.json is damaged (entry 'position'); delete {config.out}, begin again")


def local_files(pattern):
    """The SourceFiles behind a pattern, sorted by path. Raises UserError."""
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    foreign = [p for p in paths if not p.endswith(FORMATS)]
    if not paths or foreign:
        raise UserError(f"--data_files {pattern}: " + (f"{foreign[0]} is neither .parquet nor .jsonl" if foreign else
                                                       "no file matches"))
    return [SourceFile(p, Path(p).stat().st_size) for p in paths]


def fetch_ahead(fetch, files, read_ahead):
    """Yield fetch(file) for each file; with read_ahead the next one is fetched meanwhile."""
    following = _in_thread(fetch, files[0])
    for i, file in enumerate(files):
        path = (following or _in_thread(fetch, file)).result()
        following = _in_thread(fetch, files[i + 1]) if read_ahead and i + 1 < len(files) else None
        yield path


def _in_thread(call, argument):
    """A Future of call(argument), worked on by a thread that does not delay the end of the process."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(call(argument))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=work, daemon=True, name="download").start()
    return future


class Sources:
    """The source files from the manifest's position on: fetched, planned for the workers, and deleted after use."""

    def __init__(self, config, manifest):
        self.folder = Path(config.out) / "downloads"
        self._config, self._manifest = config, manifest
        self._files = [SourceFile(**f) for f in manifest.files]
        self._on_disk = {}                   # number of the file -> downloaded path
        self.size = sum(f.size for f in self._files)
        self.largest = max(f.size for f in self._files)

    def tasks(self):
        """Yield the tasks of encode_tasks, labelled with (position, bytes of the source before it)."""
        c, at = self._config, self._manifest.position
        first = at["file"]
        fetch = self._fetch if not c.data_files else lambda f: Path(f.path)
        # With --max_tokens the next file may never be needed.
        paths = fetch_ahead(fetch, self._files[first:], read_ahead=not c.data_files and c.max_tokens is None)
        done = sum(f.size for f in self._files[:first])
        for i, path in enumerate(paths, first):
            if not c.data_files:
                self._on_disk[i] = path
            start = at["start"] if i == first else 0
            for begin, share, read, *args in plan_reads(path, c.text_column, start):
                yield ({"file": i, "start": begin}, done + int(share * self._files[i].size)), read, *args
            done += self._files[i].size

    def _fetch(self, file):
        return download(self._config.dataset, self._manifest.revision, file, self.folder)

    def delete_before(self, number):
        """Delete the downloads of the files before this number: their last token is in a worker's result."""
        for i in [i for i in self._on_disk if i < number]:
            path = self._on_disk.pop(i)
            if not self._config.keep_downloads:
                path.unlink()


def write_tokens(config, manifest, sources, tokenizer):
    """Tokenise from the manifest's position to the end of the source or --max_tokens."""
    done, n_bytes, started = sum(row["tokens"] for row in manifest.shards), 0, time.monotonic()
    writer = ShardWriter(config.out, config.prefix(), manifest, config.val_tokens(), config.shard_tokens)
    skip = manifest.position["skip"]
    bar = tqdm(desc="tokenising", initial=done, total=config.max_tokens, unit="tok", unit_scale=True, disable=None,
               smoothing=0.05)
    results = encode_tasks(sources.tasks(), tokenizer, config.num_proc)
    with bar, contextlib.closing(results):
        for (position, source_bytes), tokens, size in results:
            sources.delete_before(position["file"])
            dropped = min(skip, len(tokens))        # what the finished shards hold of the first pieces
            skip -= dropped
            tokens = tokens[dropped:][:config.max_tokens and config.max_tokens - done]
            n_shards = len(manifest.shards)
            writer.append(tokens, {**position, "skip": dropped})
            done += len(tokens)
            n_bytes += size
            if source_bytes and not config.max_tokens:
                bar.total = int(done * sources.size / source_bytes)
            speed = f"{n_bytes / 1e6 / (time.monotonic() - started):.1f} MB/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(len(tokens))
            for row in manifest.shards[n_shards:]:
                bar.write(f"{row['file']} is written, {speed} of text")
            if done == config.max_tokens:
                break
        bar.total = done
    if done <= config.val_tokens():
        raise UserError(f"the source ends after {done:,} tokens, inside the validation shard of "
                        f"{config.val_tokens():,}; give a smaller --shard_tokens, or a --max_tokens, a tenth of which "
                        "is validation")
    writer.finish()


def announce(config, manifest, sources):
    """Print what will happen and where it will need room."""
    begun = f", continuing after shard {len(manifest.shards) - 1}" if manifest.shards else ""
    at = f" at commit {manifest.revision[:12]}" if manifest.revision else ""
    print(f"{manifest.source}{at}: {len(manifest.files)} files, {human_bytes(sources.size)}{begun}")
    # A byte of FineWeb-Edu's parquet gives 0.35 tokens, of two bytes each.
    needed = min(2 * (config.max_tokens or 10**15), int(0.7 * sources.size))
    needed -= sum(2 * row["tokens"] for row in manifest.shards)
    if not config.data_files:
        needed += min(2, len(manifest.files)) * sources.largest
    free = shutil.disk_usage(config.out).free
    may_not_do = "; that may not do" if needed > free else ""
    print(f"{config.num_proc or 'no'} worker process{'es' * (config.num_proc != 1)}; {config.out} will need about "
          f"{human_bytes(max(needed, 0))}, {human_bytes(free)} are free{may_not_do}", flush=True)


def verify(folder, tokenizer=""):
    """Read every token of the shards. tokenizer: the flag. Raises UserError at the first fault."""
    shards = ShardFolder(folder, need_complete=False)
    n_vocab = shards.tokenizer(tokenizer).n_vocab
    n_bytes = sum(2 * s.n_tokens for s in shards.shards)
    with tqdm(desc="verifying", total=n_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        shards.verify(n_vocab, bar.update)
    what = "hashes, sizes and token ids are right" if shards.manifest else \
        "sizes and token ids are right; there is no manifest.json to hold hashes against"
    print(f"{folder}: {len(shards.shards)} shards, {n_bytes // 2:,} tokens: {what}")
    if shards.manifest and not shards.manifest.complete:
        print("it is incomplete: run the same prepare command again, which completes it")


def main(argv=None):
    """Make or verify shards as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(Config, argv, description=__doc__.split("\n\n")[0])
    folder = Path(config.out)
    if config.verify:
        return verify(folder, config.tokenizer)
    # Chunks of what is downloaded once would fill a second place on the disk.
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
    tokenizer = default_tokenizer(config.tokenizer)
    wanted = new_manifest(config, tokenizer)
    manifest = matching_manifest(folder, wanted)
    if manifest and manifest.complete:
        print(f"{folder} already holds the shards of this command")
        return print_shards(folder)
    manifest = manifest or wanted
    find_sources(config, manifest)
    n_shards = len(manifest.shards)
    with FolderLock(folder, wait_s=0), writing_to(folder):
        now = matching_manifest(folder, wanted)
        if now and len(now.shards) != n_shards:
            raise UserError(f"another process has made shards in {folder} meanwhile; run the same command again")
        manifest.save(folder)
        tokenizer.save(folder)
        if manifest.shards:
            ShardFolder(folder, need_complete=False)        # what is there must be sound to be continued
        sources = Sources(config, manifest)
        for left_over in sources.folder.rglob("*.incomplete"):
            left_over.unlink()
        announce(config, manifest, sources)
        write_tokens(config, manifest, sources, tokenizer)
        if not config.keep_downloads:
            shutil.rmtree(sources.folder, ignore_errors=True)
    return print_shards(folder)


if __name__ == "__main__":
    run_script(main)
