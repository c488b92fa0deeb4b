"""Data sets of the Hugging Face hub: which files hold a configuration's text, and one file at a time onto the disk.

Transient faults (429, 5xx, time-outs, broken connections, bytes with another hash) are tried again with growing,
jittered pauses, none shorter than the server's Retry-After in seconds (ten minutes at most); lasting ones are a
UserError that says what to do.
"""
import errno
import functools
import hashlib
import os
import random
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from exactgpt.config import UserError

ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0       # doubled from try to try: two minutes in all
FORMATS = (".parquet", ".jsonl")
CONVERTED = "refs/convert/parquet"      # where the hub keeps its own conversions
REACH_S = 5                             # its own library takes half a minute to say that nothing answers


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set: on the hub at a commit, or on this disk."""
    path: str              # in the repository; on this disk
    size: int              # bytes
    sha256: str = ""       # where the hub says it


def work_offline():
    """Have huggingface_hub and, not imported yet, datasets use only what was downloaded before, in this process."""
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def reachable():
    """Whether the hub answers at all, within seconds; behind a proxy, whether that does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), REACH_S).close()
    except OSError:
        return False
    return True


def resolve_dataset(dataset, name=None):
    """(commit, [SourceFile]): the parquet or jsonl files of the train split of a data set's configuration, by path.

    name: the configuration (None: the default one). The data set's card says which files; without a card's word its
    parquet and jsonl files are taken, those below a folder called `name` where one is given, else those that the hub
    converted. Raises UserError.
    """
    info = _dataset_info(dataset)
    paths = [s.rfilename for s in info.siblings or []]
    configs = info.card_data.to_dict().get("configs") if info.card_data else None
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    chosen = _readable(_by_card(dataset, name, configs, paths) if configs else _by_name(name, paths))
    if not chosen and _is_converted(dataset):
        info = _dataset_info(dataset, CONVERTED)
        chosen = _readable(_by_conversion(dataset, name, [s.rfilename for s in info.siblings or []]))
    if not chosen:
        raise UserError(f"{dataset} has no parquet or jsonl files for the train split of {name or 'its default'}; look "
                        f"at https://huggingface.co/datasets/{dataset}/tree/main, or bring files with --data_files")
    return info.sha, _with_sizes(dataset, info.sha, chosen)


def _dataset_info(dataset, revision=None):
    from huggingface_hub import HfApi
    return _patiently(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=20), dataset, attempts=4)


def _is_converted(dataset):
    from huggingface_hub import HfApi
    return _patiently(lambda: HfApi().revision_exists(dataset, CONVERTED, repo_type="dataset"), dataset)


def _readable(paths):
    """Those in our formats, without ones that would land outside the folder of downloads."""
    return sorted(p for p in paths if p.endswith(FORMATS) and ".." not in Path(p).parts and not Path(p).is_absolute())


def _with_sizes(dataset, commit, paths):
    from huggingface_hub import HfApi
    found = {}
    for i in range(0, len(paths), 500):
        ask = functools.partial(HfApi().get_paths_info, dataset, paths[i:i + 500], revision=commit, repo_type="dataset")
        for f in _patiently(ask, dataset):
            found[f.path] = SourceFile(f.path, f.size, f.lfs.sha256 if f.lfs else "")
    missing = [p for p in paths if p not in found]
    if missing:
        raise UserError(f"the hub lists {missing[0]} in {dataset} but does not have it")
    return [found[p] for p in paths]


def _by_card(dataset, name, configs, paths):
    """What the card's configs list for train: [{config_name, data_files: pattern(s) or [{split, path}]}]."""
    by_name = {c.get("config_name", "default"): c.get("data_files") for c in configs}
    default = next((c.get("config_name") for c in configs if c.get("default")), None)
    only = next(iter(by_name)) if len(by_name) == 1 else "default"
    wanted = name or default or only
    if wanted not in by_name:
        known = ", ".join(sorted(by_name)[:12]) + (", ..." if len(by_name) > 12 else "")
        raise UserError(f"{dataset} has " + (f"no configuration {name!r}" if name else "several configurations")
                        + f"; choose one with --name: {known}")
    patterns = []
    for entry in by_name[wanted] if isinstance(by_name[wanted], list) else [by_name[wanted]]:
        if isinstance(entry, dict) and entry.get("split", "train") == "train":
            entry = entry.get("path")
        patterns += entry if isinstance(entry, list) else [entry] if isinstance(entry, str) else []
    return [p for p in paths if any(_glob(pattern).fullmatch(p) for pattern in patterns)]


def _glob(pattern):
    """A card's pattern as a regular expression: * stays within a folder, ** does not."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(tokens.get(part) or re.escape(part) for part in parts))


def _by_name(name, paths):
    """Without a card's word: files below a folder called `name`, or all; those of the train split where any say so."""
    paths = [p for p in paths if p.endswith(FORMATS) and (name in (None, "default") or name in Path(p).parts[:-1])]
    words = {p: set(re.split(r"[^a-z]+", p.lower())) for p in paths}
    train = [p for p in paths if "train" in words[p]]
    return train or [p for p in paths if words[p].isdisjoint({"test", "val", "valid", "validation", "dev", "eval"})]


def _by_conversion(dataset, name, paths):
    """The hub's own conversion: CONFIGURATION/train/0000.parquet; "partial-train" where it is only the beginning."""
    names = sorted({p.split("/")[0] for p in paths if p.count("/") == 2})
    wanted = name or (names[0] if len(names) == 1 else "default")
    if names and wanted not in names:
        raise UserError(f"{dataset}: choose a configuration with --name: {', '.join(names[:12])}")
    return [p for p in paths if p.startswith(f"{wanted}/train/")]


def download(dataset, commit, file, folder):
    """The path of a SourceFile of the hub below `folder`, downloaded unless it is there. Raises UserError."""
    from huggingface_hub import hf_hub_download

    def attempt():
        path = Path(hf_hub_download(dataset, file.path, repo_type="dataset", revision=commit, local_dir=folder))
        if path.stat().st_size != file.size or (file.sha256 and _sha256(path) != file.sha256):
            path.unlink()
            raise ConnectionError("the file arrived damaged")
        return path
    return _patiently(attempt, f"{dataset}/{file.path}")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _patiently(call, what, attempts=ATTEMPTS):
    """call(), again after transient faults. Raises UserError for lasting ones, and when patience ends."""
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()       # the notices here say it
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:      # every version has its own mixture of requests', httpx' and xet's classes
            response = _response(error)
            reason = f"HTTP {response.status_code}" if response is not None else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())[:160]
            _raise_lasting(error, response, what, reason)
            if attempt + 1 == attempts:
                raise UserError(f"cannot get {what} from the hub ({reason}); check the network and run the same "
                                "command again, it continues") from error
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            pause = max(pause, _retry_after(response))
            print(f"{what}: {reason}; next try in {pause:.1f} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _response(error):
    """The HTTP response behind an error, as the hub's library wraps it, or None."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _retry_after(response):
    """Seconds that the server asks to wait, at most ten minutes."""
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(value), 600.0) if re.fullmatch(r"\d+(\.\d+)?", value) else 0.0


def _raise_lasting(error, response, what, reason):
    """Raise UserError for a fault that another try cannot mend."""
    from huggingface_hub import errors
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{what} is gated: accept its terms on https://huggingface.co/datasets, then log in with "
                        "`hf auth login` or set HF_TOKEN") from error
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        raise UserError(f"there is no data set {what} on the hub, or it is private (then: `hf auth login`, or set "
                        "HF_TOKEN)") from error
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; unset it, or bring files with "
                        "--data_files") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        raise UserError(f"cannot store {what}: {error.strerror}; mend that and run the same command again, it "
                        "continues") from error
    if response is not None and 400 <= response.status_code < 500 and response.status_code not in (408, 425, 429):
        raise UserError(f"the hub refuses {what} ({reason})") from error
