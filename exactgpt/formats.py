"""Tell from its first bytes what a file is that should be UTF-8 text or parquet, and how to make that of it.

To recognize another format, add a line to FORMATS.
"""
import re
import shlex
from pathlib import Path

STDIN = "standard input"      # for messages, in the place of a path
HEAD = 8192      # bytes of a file that `find_mismatch` wants to see
ICONV = "iconv -f {encoding} -t utf-8 {{file}} > {{new}}"
# How a file begins, what it is, and the command that makes text of it.
FORMATS = [(rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", ICONV.format(encoding="utf-32")),
           (rb"\xff\xfe|\xfe\xff", "UTF-16", ICONV.format(encoding="utf-16")),
           (rb"\x1f\x8b", "compressed by gzip", "gunzip < {file} > {new}"),
           (rb"BZh[1-9]1AY&SY", "compressed by bzip2", "bunzip2 < {file} > {new}"),
           (rb"\xfd7zXZ\0", "compressed by xz", "xz -d < {file} > {new}"),
           (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -d < {file} > {new}"),
           (rb"PK\x03\x04", "a zip archive (or an Office document, to be saved as text)", "unzip -p {file} > {new}"),
           (rb"%PDF-\d", "a PDF", "pdftotext {file} {new}"),
           (rb"PAR1", "parquet", "mv {file} {file}.parquet")]
# Of UTF-16 and UTF-32 without a mark: which bytes of four are zero in mostly English text -> the encoding
ZEROS = {(0, 1, 0, 1): "utf-16le", (1, 0, 1, 0): "utf-16be", (0, 1, 1, 1): "utf-32le", (1, 1, 1, 0): "utf-32be"}


def find_mismatch(head, path):
    """Return what is wrong, as one line with advice, if a file begins otherwise than its name promises, else None.

    head: its first bytes. The ending .parquet promises parquet, every other one UTF-8 text.
    """
    is_parquet = Path(path).suffix.lower() == ".parquet"
    if is_parquet and head.startswith(b"PAR"):
        return None
    for start, what, command in [*FORMATS, *_unmarked_encoding(head)]:
        if re.match(start, head):
            promised = "parquet" if is_parquet else "UTF-8 text"
            return f"{path} is not {promised} but {what}; convert it first: {_fill_in(command, path)}"
    if is_parquet:
        return (f"{path} is text, not parquet; rename it to end in what it holds: .txt, .jsonl, .csv or .tsv"
                if head and b"\0" not in head else None)      # else pyarrow says what is wrong
    return f"{path} is a binary file (it contains zero bytes); use a text file" if b"\0" in head else None


def _unmarked_encoding(head):
    n = len(head) // 4
    encoding = ZEROS.get(tuple(int(head[i:4 * n:4].count(0) > n / 2) for i in range(4)))
    if encoding and "\0" not in head[:4 * n].decode(encoding, "replace"):
        yield b"", encoding.upper(), ICONV.format(encoding=encoding)


def advise_not_utf8(byte, path):
    """Return the line for a text that contains a byte which is not UTF-8."""
    command = _fill_in(ICONV.format(encoding="latin1"), path)
    return f"{path} is not UTF-8 text (it contains the byte {byte:#04x}); convert it first, for instance with {command}"


def _fill_in(command, path):
    if path == STDIN:
        return command.format(file="FILE", new="NEW")
    return command.format(file=shlex.quote(str(path)), new=shlex.quote(f"new-{Path(path).name}"))
