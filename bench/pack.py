"""Collect in data/packed what the GPU targets of the Makefile read, for a machine without a network: 53 MB.

    python -m bench.pack FOLDER     # with wikipedia_48m_tokens.uint16.xz, hellaswag_val.jsonl.xz, tinyshakespeare.txt
                                    # and unpack.py, which unpacks the two
"""
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError, flag, parse_config, run_script
from tokenizer import gpt2_tokenizer

PACKED = Path("data/packed")
FILES = ("wikipedia_48m_tokens.uint16.xz", "hellaswag_val.jsonl.xz", "unpack.py")


@dataclass
class PackConfig:
    """The flags of this script."""
    folder: str = flag(None, "where the files are", positional=True)


def main(argv=None):
    """Copy the files, and bring the vocabulary and the shards of tinyshakespeare, which need packages."""
    config = parse_config(PackConfig, argv, __doc__.split("\n\n")[0])
    missing = [name for name in (*FILES, "tinyshakespeare.txt") if not (Path(config.folder or "") / name).exists()]
    if missing:
        raise UserError(f"{config.folder} has no {missing[0]}")
    PACKED.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(Path(config.folder) / name, PACKED / name)
    gpt2_tokenizer().save(PACKED)
    shutil.rmtree(PACKED / "tinyshakespeare", ignore_errors=True)
    subprocess.run([sys.executable, "prepare_text.py", str(Path(config.folder) / "tinyshakespeare.txt"), "--out",
                    str(PACKED / "tinyshakespeare")], check=True)
    size = sum(f.stat().st_size for f in PACKED.rglob("*") if f.is_file())
    print(f"{PACKED}: {size / 1e6:.0f} MB; on the GPU machine: make bench-gpu, make run-gpu, make run-gpu-shakespeare")


if __name__ == "__main__":
    run_script(main)
