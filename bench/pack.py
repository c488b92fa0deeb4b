"""Collect the data that bench.gpu reads in data/packed (55 MB), and unpack it on a machine without a network.

    python -m bench.pack FOLDER     # FOLDER holds wikipedia_48m_tokens.uint16.xz, hellaswag_val.jsonl.xz,
                                    # tinyshakespeare.txt, and unpack.py, which unpacks the first two
    python -m bench.pack --unpack   # data/packed -> data/wikipedia_48m, data/hellaswag, data/tinyshakespeare
"""
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.tokenizer import gpt2_tokenizer

FILES = ("wikipedia_48m_tokens.uint16.xz", "hellaswag_val.jsonl.xz", "unpack.py")
VOCABULARY = ("vocab.bpe", "encoder.json")


@dataclass
class PackConfig:
    """The flags of this script."""
    folder: list[str] = flag([], "folder of the files to collect", positional=True)
    unpack: bool = flag(False, "unpack DATA/packed instead of collecting it")
    data: str = flag("data", "folder for packed and for the unpacked data")

    def check(self):
        """Raise UserError unless either one folder or --unpack is given."""
        if len(self.folder) != (0 if self.unpack else 1):
            raise UserError("give either the folder of the files to collect or --unpack")


def main(argv=None):
    """Collect or unpack the files."""
    config = parse_config(PackConfig, argv, __doc__.split("\n\n")[0])
    data = Path(config.data)
    if config.unpack:
        unpack(data)
    else:
        pack(Path(config.folder[0]), data / "packed")


def pack(folder, packed):
    """Copy the files to data/packed and add GPT-2's vocabulary and the tinyshakespeare shards.

    Those two need packages that the GPU machine may lack. Raises UserError if a file is missing.
    """
    missing = [name for name in (*FILES, "tinyshakespeare.txt") if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}")
    packed.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, packed / name)
    gpt2_tokenizer().save(packed)
    shutil.rmtree(packed / "tinyshakespeare", ignore_errors=True)
    subprocess.run([sys.executable, "prepare_text.py", str(folder / "tinyshakespeare.txt"), "--out",
                    str(packed / "tinyshakespeare")], check=True, stdout=subprocess.DEVNULL)
    size = sum(f.stat().st_size for f in packed.rglob("*") if f.is_file())
    print(f"{packed}: {size / 1e6:.0f} MB\nnext: copy this clone, {packed} with it, to the GPU machine, and there\n"
          "      python -m bench.gpu")


def unpack(data):
    """Unpack data/packed into `data`, unless that has been done. Raises UserError if it is missing or incomplete."""
    packed = data / "packed"
    missing = [name for name in (*FILES, *VOCABULARY, "tinyshakespeare") if not (packed / name).exists()]
    if missing:
        raise UserError(f"{packed} has no {missing[0]}; run python -m bench.pack FOLDER where the files are and copy "
                        f"{packed} here")
    if all((data / "wikipedia_48m" / name).exists() for name in VOCABULARY):        # written last
        print(f"{data / 'wikipedia_48m'} is already unpacked")
        return
    subprocess.run([sys.executable, str(packed / "unpack.py"), str(data)], check=True)
    shutil.copytree(packed / "tinyshakespeare", data / "tinyshakespeare", dirs_exist_ok=True)
    for name in reversed(VOCABULARY):
        shutil.copyfile(packed / name, data / "wikipedia_48m" / name)


if __name__ == "__main__":
    run_script(main)
