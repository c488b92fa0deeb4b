"""Find the files of a data set on the Hugging Face hub and download them, with retries.

Temporary errors (429, 5xx, timeouts, broken connections, a wrong hash) are retried after growing, jittered pauses, at
least the server's Retry-After, up to ten minutes. A permanent error is a UserError that says what to do.
"""
import errno
import hashlib
import random
import re
import sys
import time
from pathlib import Path

from exactgpt.config import UserError
from exactgpt.documents import RESUMABLE

ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0       # doubled after each attempt: about two minutes in total
CONVERTED = "refs/convert/parquet"               # the revision where the hub keeps its parquet conversion of a data set
CONNECT_TIMEOUT_S = 5                            # huggingface_hub itself needs half a minute to notice a dead network


def work_offline():
    """Make huggingface_hub use only its cache in this process, and `datasets` too if it is imported later."""
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def reachable():
    """Return True if the hub answers within CONNECT_TIMEOUT_S and HF_HUB_OFFLINE is not set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except Exception:       # httpx's or requests', or OfflineModeIsEnabled
        return False
    return True


def resolve_dataset(dataset, name=None):
    """Return (commit, [{path, size, sha256}, ...]) of a data set's train files, sorted by path. Raises UserError."""
    # name: the configuration (None: the default one). The files are those that the data set's card lists. Without such
    # a list they are its parquet and jsonl files, below a folder called `name` if one is given; without any, those of
    # the hub's own conversion to parquet, CONFIGURATION/train/0000.parquet.
    from huggingface_hub import HfApi
    info, files = _list_files(dataset)
    configs = info.card_data.to_dict().get("configs") if info.card_data else None
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    if configs:
        chosen = _train_files_in_card(dataset, name, configs, files)
    else:
        below = [path for path in files if name in (None, "default") or name in Path(path).parts[:-1]]
        words = {path: set(re.split(r"[^a-z]+", path.lower())) for path in below}
        other_splits = {"test", "val", "valid", "validation", "dev", "eval"}
        chosen = [path for path in below if "train" in words[path]]     # else all that look like no other split
        chosen = chosen or [path for path in below if words[path].isdisjoint(other_splits)]
    if not chosen and _with_retries(lambda: HfApi().revision_exists(dataset, CONVERTED, repo_type="dataset"), dataset):
        info, files = _list_files(dataset, CONVERTED)
        names = {path.split("/")[0] for path in files}
        wanted = name or (min(names) if len(names) == 1 else "default")
        if names and wanted not in names:
            known = ", ".join(sorted(names)[:12])
            raise UserError(f"{dataset} has no configuration {wanted!r}; choose one with --name: {known}")
        chosen = [path for path in files if path.startswith(f"{wanted}/train/")]
    if not chosen:
        raise UserError(f"{dataset} has no parquet or jsonl files for the train split of {name or 'its default'}; look "
                        f"at https://huggingface.co/datasets/{dataset}/tree/main, or use local files with --data_files")
    return info.sha, [files[path] for path in sorted(chosen)]


def _list_files(dataset, revision=None):
    """Return (the hub's description, {path: {path, size, sha256}}) of a data set at a revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    info = _with_retries(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=20), dataset, attempts=4)
    tree = _with_retries(lambda: list(HfApi().list_repo_tree(
        dataset, recursive=True, revision=info.sha, repo_type="dataset")), dataset)
    # Only the formats that we read, and no path that leads out of the folder for downloads.
    return info, {f.path: dict(path=f.path, size=f.size, sha256=f.lfs.sha256 if f.lfs else "") for f in tree
                  if isinstance(f, RepoFile) and f.path.endswith(RESUMABLE)
                  and ".." not in Path(f.path).parts and not Path(f.path).is_absolute()}


def _train_files_in_card(dataset, name, configs, paths):
    """Return the paths that the card's configurations [{config_name, data_files}] list for the train split."""
    from fsspec.utils import glob_translate
    by_name = {c.get("config_name", "default"): c for c in configs}
    wanted = name or next((n for n, c in by_name.items() if c.get("default") or len(by_name) == 1), "default")
    if wanted not in by_name:
        known = ", ".join(sorted(by_name)[:12]) + (", ..." if len(by_name) > 12 else "")
        raise UserError(f"{dataset} has " + (f"no configuration {name!r}" if name else "several configurations")
                        + f"; choose one with --name: {known}")
    patterns, entries = [], by_name[wanted].get("data_files")      # a pattern, or a list of patterns or {split, path}
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, dict) and entry.get("split", "train") == "train":
            entry = entry.get("path")
        patterns += entry if isinstance(entry, list) else [entry] if isinstance(entry, str) else []
    # In these patterns, as in fsspec's, * stays within a folder and ** does not.
    try:
        regexes = [glob_translate(pattern.removeprefix("./")) for pattern in patterns]
    except ValueError as error:
        raise UserError(f"the card of {dataset}: {error}") from error
    return [path for path in paths if any(re.match(regex, path) for regex in regexes)]


def download_source_file(dataset, commit, file, folder):
    """Download a file {path, size, sha256} into `folder` unless it is there; return its path. Raises UserError."""
    from huggingface_hub import hf_hub_download

    def attempt():
        path = Path(hf_hub_download(dataset, file["path"], repo_type="dataset", revision=commit, local_dir=folder))
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
        if path.stat().st_size != file["size"] or file["sha256"] not in ("", digest.hexdigest()):
            path.unlink()
            raise ConnectionError("the downloaded file is damaged")
        return path
    return _with_retries(attempt, f"{dataset}/{file['path']}")


def _with_retries(function, what, attempts=ATTEMPTS):
    """Return function(), retried after temporary errors. Raises UserError if it fails for good."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()       # we print our own notices
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:      # each version raises its own mix of exceptions from requests, httpx and xet
            chain = [error]             # huggingface_hub wraps errors
            while chain[-1].__cause__:
                chain.append(chain[-1].__cause__)
            response = next((e.response for e in chain if getattr(e, "response", None) is not None), None)
            status = response.status_code if response is not None else 0
            reason = f"HTTP {status}" if status else " ".join(f"{type(error).__name__}: {error}".split())[:160]
            if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
                raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; unset it, or use local files with "
                                "--data_files") from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise UserError(f"cannot store {what}: {error.strerror}; fix that and run the same command again to "
                                "continue") from error
            if isinstance(error, errors.HFValidationError) or (400 <= status < 500 and status not in (408, 425, 429)):
                raise UserError(f"the hub refuses {what} ({reason}); look for it on https://huggingface.co/datasets; "
                                "if it is private or gated, accept its terms there and log in with `hf auth login` or "
                                "set HF_TOKEN") from error
            if attempt + 1 == attempts:
                raise UserError(f"cannot get {what} from the hub ({reason}); check the network and run the same "
                                "command again to continue") from error
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            pause = max(pause, min(float(asked), 600.0) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0)
            print(f"{what}: {reason}; retrying in {pause:.1f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
