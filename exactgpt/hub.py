"""Find the files of a data set on the Hugging Face hub and download them, with retries.

Temporary errors (429, 5xx, timeouts, broken connections, a wrong hash) are retried after growing, jittered pauses. A
pause is at least the server's Retry-After, up to ten minutes. A permanent error is a UserError that says what to do.
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
from exactgpt.documents import SPLITTERS

ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0       # doubled after each attempt: about two minutes in total
FORMATS = tuple(SPLITTERS)                       # the file suffixes that prepare_fineweb.py can read
CONVERTED_REVISION = "refs/convert/parquet"      # the hub converts many data sets to parquet and keeps that here
CONNECT_TIMEOUT_S = 5                            # huggingface_hub itself needs half a minute to notice a dead network


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set, on the hub or on this disk."""
    path: str              # path in the hub repository, or on this disk
    size: int              # bytes
    sha256: str = ""       # "" if the hub does not give one, and for local files


def work_offline():
    """Make huggingface_hub use only its cache in this process, and `datasets` too if it is imported later."""
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def reachable():
    """Return True if the hub, or the proxy to it, accepts a connection within CONNECT_TIMEOUT_S.

    Returns False at once if HF_HUB_OFFLINE is set.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        address = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
        socket.create_connection(address, CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def resolve_dataset(dataset, name=None):
    """Return (commit, [SourceFile]) with the train files of a data set, sorted by path. Raises UserError.

    name: the configuration (None: the default one). The files are those that the data set's card lists. Without such a
    list they are its parquet and jsonl files, below a folder called `name` if one is given. If there are none, they are
    the files of the hub's own parquet conversion.
    """
    info = _dataset_info(dataset)
    paths = [s.rfilename for s in info.siblings or []]
    configs = info.card_data.to_dict().get("configs") if info.card_data else None
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    chosen = _train_files_in_card(dataset, name, configs, paths) if configs else _guess_train_files(name, paths)
    chosen = _readable_paths(chosen)
    if not chosen and _has_conversion(dataset):
        info = _dataset_info(dataset, CONVERTED_REVISION)
        paths = [s.rfilename for s in info.siblings or []]
        chosen = _readable_paths(_train_files_in_conversion(dataset, name, paths))
    if not chosen:
        raise UserError(f"{dataset} has no parquet or jsonl files for the train split of {name or 'its default'}; look "
                        f"at https://huggingface.co/datasets/{dataset}/tree/main, or use local files with --data_files")
    return info.sha, _source_files(dataset, info.sha, chosen)


def _dataset_info(dataset, revision=None):
    from huggingface_hub import HfApi
    return _with_retries(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=20), dataset, attempts=4)


def _has_conversion(dataset):
    from huggingface_hub import HfApi
    return _with_retries(lambda: HfApi().revision_exists(dataset, CONVERTED_REVISION, repo_type="dataset"), dataset)


def _readable_paths(paths):
    """Return the paths in a format we read, without those that would be saved outside the download folder."""
    return sorted(p for p in paths if p.endswith(FORMATS) and ".." not in Path(p).parts and not Path(p).is_absolute())


def _source_files(dataset, commit, paths):
    """Return a SourceFile, with size and hash, for each path in a data set."""
    from huggingface_hub import HfApi
    found = {}
    for i in range(0, len(paths), 500):
        ask = functools.partial(HfApi().get_paths_info, dataset, paths[i:i + 500], revision=commit, repo_type="dataset")
        for f in _with_retries(ask, dataset):
            found[f.path] = SourceFile(f.path, f.size, f.lfs.sha256 if f.lfs else "")
    missing = [p for p in paths if p not in found]
    if missing:
        raise UserError(f"the hub lists {missing[0]} in {dataset} but does not have it; run the same command again")
    return [found[p] for p in paths]


def _train_files_in_card(dataset, name, configs, paths):
    """Return the paths that the data set's card lists for the train split.

    configs: the card's list of {config_name, data_files}, where data_files is a pattern, a list of patterns, or a list
    of {split, path}.
    """
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
    return [p for p in paths if any(_glob_regex(pattern).fullmatch(p) for pattern in patterns)]


def _glob_regex(pattern):
    """Translate a card's pattern into a regular expression. * stays within a folder, ** does not."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(tokens.get(part) or re.escape(part) for part in parts))


def _guess_train_files(name, paths):
    """Guess the train files from the paths alone, below a folder called `name` if one is given.

    If some paths contain "train", return those; else return all but the paths that look like another split.
    """
    paths = [p for p in paths if p.endswith(FORMATS) and (name in (None, "default") or name in Path(p).parts[:-1])]
    words = {p: set(re.split(r"[^a-z]+", p.lower())) for p in paths}
    train = [p for p in paths if "train" in words[p]]
    return train or [p for p in paths if words[p].isdisjoint({"test", "val", "valid", "validation", "dev", "eval"})]


def _train_files_in_conversion(dataset, name, paths):
    """Return the train files of the hub's parquet conversion, CONFIGURATION/train/0000.parquet.

    "partial-train", which has only the beginning of a large data set, is left out.
    """
    names = sorted({p.split("/")[0] for p in paths if p.count("/") == 2})
    wanted = name or (names[0] if len(names) == 1 else "default")
    if names and wanted not in names:
        raise UserError(f"{dataset} has no configuration {wanted!r}; choose one with --name: {', '.join(names[:12])}")
    return [p for p in paths if p.startswith(f"{wanted}/train/")]


def download_source_file(dataset, commit, file, folder):
    """Download a SourceFile into `folder`, unless it is already there, and return its path. Raises UserError."""
    from huggingface_hub import hf_hub_download

    def attempt():
        path = Path(hf_hub_download(dataset, file.path, repo_type="dataset", revision=commit, local_dir=folder))
        if path.stat().st_size != file.size or (file.sha256 and _sha256(path) != file.sha256):
            path.unlink()
            raise ConnectionError("the downloaded file is damaged")
        return path
    return _with_retries(attempt, f"{dataset}/{file.path}")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _with_retries(function, what, attempts=ATTEMPTS):
    """Return function(), retried after temporary errors. Raises UserError if it fails for good."""
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()       # we print our own notices
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:      # each version raises its own mix of exceptions from requests, httpx and xet
            response = _http_response(error)
            reason = f"HTTP {response.status_code}" if response is not None else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())[:160]
            _raise_if_permanent(error, response, what, reason)
            if attempt + 1 == attempts:
                raise UserError(f"cannot get {what} from the hub ({reason}); check the network and run the same "
                                "command again to continue") from error
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            pause = max(pause, _retry_after_s(response))
            print(f"{what}: {reason}; retrying in {pause:.1f} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _http_response(error):
    """Return the HTTP response of an error or of one of its causes, or None. huggingface_hub wraps errors."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _retry_after_s(response):
    """Return the seconds in the Retry-After header (0 without one), at most ten minutes."""
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(value), 600.0) if re.fullmatch(r"\d+(\.\d+)?", value) else 0.0


def _raise_if_permanent(error, response, what, reason):
    """Raise UserError for a permanent error."""
    from huggingface_hub import errors
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{what} is gated: accept its terms on https://huggingface.co/datasets, then log in with "
                        "`hf auth login` or set HF_TOKEN") from error
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        raise UserError(f"there is no data set {what} on the hub, or it is private (then run `hf auth login` or set "
                        "HF_TOKEN)") from error
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; unset it, or use local files with "
                        "--data_files") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        raise UserError(f"cannot store {what}: {error.strerror}; fix that and run the same command again to "
                        "continue") from error
    if response is not None and 400 <= response.status_code < 500 and response.status_code not in (408, 425, 429):
        raise UserError(f"the hub refuses {what} ({reason}); check that you can open it on "
                        "https://huggingface.co/datasets") from error
