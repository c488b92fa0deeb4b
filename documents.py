"""Documents and rows from .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files, one at a time, trusting nothing.

`read_documents` gives the text of a corpus, `read_rows` some columns of a table. What cannot be read is a UserError
that names the file and the line.
"""
import contextlib
import csv
import json
import re
from pathlib import Path

from config import UserError

PART_CHARS = 1 << 20       # a longer document comes in parts of about this many characters
_SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def find_files(paths):
    """The files behind a list of files and directories (searched through, in sorted order). Raises UserError."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IN_DIRECTORIES and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not inside:
                raise UserError(f"no text under {path} ({', '.join(_IN_DIRECTORIES)})")
            found += inside
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif path.suffix.lower() not in _FORMATS:
            raise UserError(f"cannot read {path}: it must end in one of {', '.join(_FORMATS)}")
        else:
            found.append(path)
    return found


def read_documents(path, text_column="text", separator=None):
    """Yield (text, starts) for each document of a file, in order; starts is False where a document goes on.

    A .txt or .md file is one document, or as many as `separator` makes of it; a long one comes in parts. Other
    files hold a document a row, in the column `text_column`. Parts are cut between a character and the whitespace
    after it: no match of GPT-2's split pattern spans that, so the parts' ids are the ids of the whole.
    Raises UserError.
    """
    if _FORMATS[Path(path).suffix.lower()] is None:
        yield from _split_text(path, separator)
    else:
        for (text,) in read_rows(path, [text_column]):
            yield text, True


def _split_text(path, separator):
    rest, starts = "", True
    overlap = len(separator) - 1 if separator else 0    # a separator may begin here and end in the next chunk
    with _open_text(path) as f:
        while chunk := f.read(PART_CHARS):
            _refuse_binary(chunk, path)
            rest += chunk
            if separator:
                *documents, rest = rest.split(separator)
                for document in documents:
                    yield document, starts
                    starts = True
            cut = _SAFE_CUT.match(rest, 0, len(rest) - overlap) if len(rest) > PART_CHARS else None
            if cut:
                yield cut[0], starts
                rest, starts = rest[cut.end():], False
    if rest:
        yield rest, starts


@contextlib.contextmanager
def _open_text(path, newline=None):
    """An open UTF-8 text file; what goes wrong while it is read is a UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as f:
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (it holds the byte {error.object[error.start]:#04x}); if it is text "
                        "of another encoding: iconv -f latin1 -t utf-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _refuse_binary(text, path):
    if "\0" in text:
        raise UserError(f"{path} is a binary file (it holds zero bytes), not text")


def read_rows(path, columns):
    """Yield the values of the named columns of each row as a tuple of str; a null is "". Raises UserError.

    .jsonl: an object a line; .json: a list of objects; .csv and .tsv: a header line; a .tsv has no quoting.
    """
    reader = _FORMATS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} has no columns; bring one of {', '.join(k for k, v in _FORMATS.items() if v)}")
    for where, values in reader(path, columns):
        yield tuple(v if type(v) is str else _to_text(v, where, c) for v, c in zip(values, columns))


def _to_text(value, where, column):
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise UserError(f"{where}: column {column!r} holds a {type(value).__name__}, not text")


def require_columns(columns, present, where):
    """Raise UserError unless all the columns are present."""
    for column in columns:
        if column not in present:
            hint = "; name the right one with --text_column" if len(columns) == 1 else ""
            raise UserError(f"{where}: no column {column!r} among {', '.join(map(str, present)) or 'none'}{hint}")


def parse_json_line(line, where, columns):
    """The values of the columns in one line of JSON (str or bytes). Raises UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    return _pick(row, where, columns)


def _pick(row, where, columns):
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, but is a {type(row).__name__}")
    require_columns(columns, row, where)
    return [_mend(row[c]) if isinstance(row[c], str) else row[c] for c in columns]


def _mend(text):
    """The text with lone halves of surrogate pairs, which JSON can say and UTF-8 cannot, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_jsonl(path, columns):
    with _open_text(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse_json_line(line, where, columns)


def _read_json(path, columns):
    with _open_text(path) as f:
        try:
            rows = json.load(f)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a JSON list of objects, but holds a {type(rows).__name__}")
    for i, row in enumerate(rows):
        where = f"{path}, item {i}"
        yield where, _pick(row, where, columns)


def _read_csv(path, columns, **dialect):
    csv.field_size_limit(2**31 - 1)
    with _open_text(path, newline="") as f:
        reader = csv.reader(f, **dialect)
        try:
            header = next(reader, [])
            require_columns(columns, header, path)
            indices = [header.index(c) for c in columns]
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row and len(row) != len(header):
                    raise UserError(f"{where}: {len(row)} cells, but {len(header)} in the header; quote cells that hold "
                                    "a separator")
                if row:
                    yield where, [row[i] for i in indices]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _read_tsv(path, columns):
    return _read_csv(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path, columns):
    file = open_parquet(path, columns)
    try:
        for batch in file.iter_batches(batch_size=1024, columns=columns, use_threads=False):
            for values in zip(*(column.to_pylist() for column in batch.columns)):
                yield path, values
    except (OSError, ValueError) as error:      # pyarrow's errors are one or the other
        raise damaged(path, error) from error


def open_parquet(path, columns):
    """A pyarrow ParquetFile that has the columns; it holds little of a column in memory. Raises UserError."""
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    require_columns(columns, file.schema_arrow.names, path)
    return file


def damaged(path, error):
    """The UserError for a parquet file that pyarrow cannot read."""
    return UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0][:200]})")


# None: plain text, no columns.
_FORMATS = {".txt": None, ".md": None, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
            ".parquet": _read_parquet}
_IN_DIRECTORIES = [suffix for suffix in _FORMATS if suffix != ".json"]   # stray .json files are settings, not text
