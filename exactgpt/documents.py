"""Read documents, or some columns of a table, from .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files.

`read_documents` yields the texts of a file, `read_rows` the values of some columns. Nothing in a file is trusted: a bad
file raises a UserError that names the file and, if possible, the line.

To add an input format to prepare_text.py, write a function like `_read_csv` and add its suffix to the table READERS.
To add one to prepare_fineweb.py, write a function like `_split_jsonl` and add its suffix to the table SPLITTERS.
"""
import ast
import codecs
import contextlib
import csv
import functools
import json
import re
import sysconfig
import warnings
from pathlib import Path

from exactgpt.config import UserError, read_json

PART_CHARS = 1 << 20       # a longer .txt or .md document is yielded in parts of about this many characters
PIECE_BYTES = 1 << 21      # size of the pieces that split_into_pieces makes
LARGE_GROUP = 1 << 24      # bytes; a larger parquet row group would take too much memory in a worker
_SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def find_files(paths):
    """Return the files in a list of files and directories. Directories are searched recursively, in sorted order.

    Raises UserError for a missing or unsupported file and for a directory without text.
    """
    suffixes = [suffix for suffix in READERS if suffix != ".json"]     # stray .json files are settings, not text
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not inside:
                raise UserError(f"no text files in {path} (looked for {', '.join(suffixes)})")
            found += inside
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif path.suffix.lower() not in READERS:
            raise UserError(f"cannot read {path}: it must end in one of {', '.join(READERS)}")
        else:
            found.append(path)
    return found


def read_documents(path, text_column="text", separator=None):
    """Yield (text, starts) for the documents of a file, in order. Raises UserError.

    A .txt or .md file is one document, or several if `separator` is given. A long document is yielded in parts; starts
    is False for all but the first. Other files have one document per row, in the column `text_column`.
    Parts end between a character and the whitespace after it. No match of GPT-2's split pattern spans such a place, so
    the parts together have the token ids of the whole.
    """
    if READERS[Path(path).suffix.lower()] is None:
        yield from _read_text(path, separator)
    else:
        for (text,) in read_rows(path, [text_column]):
            yield text, True


def _read_text(path, separator):
    rest, starts = "", True
    overlap = len(separator) - 1 if separator else 0    # a separator may begin here and end in the next chunk
    with _open_text(path) as f:
        while chunk := f.read(PART_CHARS):
            _check_not_binary(chunk, path)
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
    """Open a UTF-8 text file and turn errors while it is read into UserErrors."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as f:
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (it contains the byte {error.object[error.start]:#04x}); convert it "
                        "first, for instance with iconv -f latin1 -t utf-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _check_not_binary(text, path):
    if "\0" in text:
        raise UserError(f"{path} is a binary file (it contains zero bytes); use a text file")


def read_rows(path, columns):
    """Yield the values of the named columns of each row as a tuple of str; null becomes "". Raises UserError.

    .jsonl: one object per line; .json: a list of objects; .csv and .tsv: a header line first; .tsv: no quoting.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} has no columns; use one of {', '.join(k for k, v in READERS.items() if v)}")
    for where, values in reader(path, columns):
        yield tuple(v if type(v) is str else _to_text(v, where, c) for v, c in zip(values, columns))


def _to_text(value, where, column):
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise UserError(f"{where}: column {column!r} contains a {type(value).__name__}, not text")


def check_columns_exist(columns, present, where):
    """Raise UserError unless all columns are present."""
    if not present:
        raise UserError(f"{where}: there are no columns")
    for column in columns:
        if column not in present:
            hint = "; choose one with --text_column" + " and --label_column" * (len(columns) > 1)
            raise UserError(f"{where}: no column {column!r} among {', '.join(map(str, present))}{hint}")


def read_objects(path):
    """Yield (place for messages, object) for each object in a .json list, or in any other file one a line.

    Raises UserError that names the place.
    """
    if Path(path).suffix.lower() == ".json":
        for i, value in enumerate(read_json(path, list), 1):
            yield f"{path}, item {i}", _require_object(value, f"{path}, item {i}")
    else:
        with _open_text(path) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}, line {number}", parse_object(line, f"{path}, line {number}")


def parse_object(line, where):
    """Return the object in one line of JSON (str or bytes). Raises UserError that names the place `where`."""
    try:
        return _require_object(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _require_object(value, where):
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, but is a {type(value).__name__}")
    return value


def _column_values(value, where, columns):
    check_columns_exist(columns, value, where)
    return [_replace_lone_surrogates(value[c]) if isinstance(value[c], str) else value[c] for c in columns]


def _replace_lone_surrogates(text):
    """Return the text with U+FFFD for lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_json(path, columns):
    for where, value in read_objects(path):
        yield where, _column_values(value, where, columns)


def _read_csv(path, columns, **dialect):
    csv.field_size_limit(2**31 - 1)
    with _open_text(path, newline="") as f:
        reader = csv.reader(f, **dialect)
        try:
            header = next(reader, [])
            check_columns_exist(columns, header, path)
            indices = [header.index(c) for c in columns]
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row and len(row) != len(header):
                    raise UserError(f"{where}: {len(row)} cells, but {len(header)} in the header; quote cells that "
                                    "contain the separator")
                if row:
                    yield where, [row[i] for i in indices]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _read_tsv(path, columns):
    return _read_csv(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path, columns):
    file = open_parquet(path, columns)
    with _parquet_errors(path):
        for batch in file.iter_batches(batch_size=1024, columns=columns, use_threads=False):
            for values in zip(*(column.to_pylist() for column in batch.columns)):
                yield path, values


def open_parquet(path, columns):
    """Return a pyarrow ParquetFile that has the columns, opened to use little memory. Raises UserError."""
    import pyarrow.parquet
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())   # the default pool keeps freed memory: 30 MB per worker
    with _parquet_errors(path):
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    check_columns_exist(columns, file.schema_arrow.names, path)
    return file


@contextlib.contextmanager
def _parquet_errors(path):
    try:
        yield
    except (OSError, ValueError) as error:      # every pyarrow error is one of these
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path} is not a readable parquet file ({reason})") from error


# File suffix -> function(path, columns) that yields (place for messages, values of the columns) for each row. None:
# plain text without columns, read by _read_text.
READERS = {".txt": None, ".md": None, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
           ".parquet": _read_parquet}


# -----------------------------------------------------------------------------
# large files in pieces: one process splits a file, other processes read the pieces

def split_into_pieces(path, column, start=0):
    """Yield (start, share, read, *args) for the pieces of a .parquet or .jsonl file from `start` on. Raises UserError.

    start: position of the piece (a row of a parquet file, a byte of a .jsonl file); pass it to a later call to continue
    there. share: fraction of the file before the piece, 0 to 1. read(*args) yields the piece's documents (text, True)
    in any process.
    """
    split = next(function for suffix, function in SPLITTERS.items() if str(path).endswith(suffix))
    return split(str(path), column, start)


def _split_jsonl(path, column, start):
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as f:
            while start < size:
                f.seek(start + PIECE_BYTES)
                f.readline()
                stop = min(f.tell(), size)
                yield start, start / size, read_jsonl_lines, path, column, start, stop
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_jsonl_lines(path, column, start, stop):
    """Yield (text, True) for the lines of a .jsonl file from byte `start` to byte `stop`. Raises UserError."""
    try:
        with open(path, "rb") as f:
            f.seek(start)
            data = f.read(stop - start)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for line in data.removeprefix(codecs.BOM_UTF8 if start == 0 else b"").split(b"\n"):
        where = f"{path}, byte {start:,}"
        start += len(line) + 1
        if line.strip():
            (text,) = _column_values(parse_object(line, where), where, [column])
            yield text if type(text) is str else _to_text(text, where, column), True


def _split_parquet(path, column, start):
    """Split a parquet file at row groups.

    Usually the worker reads the row groups itself. The row group that `start` lies in and row groups larger than
    LARGE_GROUP are read here instead, and the piece carries their text.
    """
    file = open_parquet(path, [column])
    kind = str(file.schema_arrow.field(column).type)
    if "string" not in kind or kind.startswith(("list", "struct", "map")):
        raise UserError(f"{path}: column {column!r} contains {kind}, not text")
    n_rows = file.metadata.num_rows
    groups, groups_start, groups_bytes = [], 0, 0       # consecutive small row groups that become one piece
    for group, first, stop, size in _row_group_ranges(file.metadata, column):
        if stop <= start:
            continue
        read_here = first < start or size > LARGE_GROUP
        if groups and (read_here or groups_bytes >= PIECE_BYTES):
            yield groups_start, groups_start / n_rows, read_row_groups, path, column, groups
            groups = []
        if read_here:
            batch_rows = max(1, (stop - first) * PIECE_BYTES // max(size, 1))
            for row, texts in _read_row_group(file, path, column, group, first, start, batch_rows):
                yield row, row / n_rows, iter_texts, texts
            continue
        if not groups:
            groups_start, groups_bytes = first, 0
        groups.append(group)
        groups_bytes += size
    if groups:
        yield groups_start, groups_start / n_rows, read_row_groups, path, column, groups


def _row_group_ranges(metadata, column):
    """Yield (row group, first row, one past the last row, uncompressed bytes of the column)."""
    first = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = (group.column(j) for j in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
        yield i, first, first + group.num_rows, size
        first += group.num_rows


def _read_row_group(file, path, column, group, first, start, batch_rows):
    """Yield (first row, texts) for the rows of a row group from row `start` on, batch by batch."""
    with _parquet_errors(path):
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
            if first + len(batch) > start:
                begin = max(first, start)
                yield begin, batch.column(0).slice(begin - first).to_pylist()
            first += len(batch)


def read_row_groups(path, column, groups):
    """Yield (text, True) for the rows in a list of row groups of a parquet file. Raises UserError."""
    with _parquet_errors(path):
        file = _open_parquet_cached(path, column)
        for batch in file.iter_batches(256, row_groups=groups, columns=[column], use_threads=False):
            yield from iter_texts(batch.column(0).to_pylist())


@functools.lru_cache(maxsize=1)
def _open_parquet_cached(path, column):
    """Keep the last file open: a footer with thousands of row groups takes a while to parse."""
    return open_parquet(path, [column])


def iter_texts(texts):
    """Yield (text, True) for each text of a list; None becomes an empty document."""
    return ((text or "", True) for text in texts)


# File suffix -> function(path, column, start) that yields the pieces; see split_into_pieces.
SPLITTERS = {".parquet": _split_parquet, ".jsonl": _split_jsonl}


# -----------------------------------------------------------------------------
# text for --demo, about 2 MB: the language reference (pydoc_data) and the docstrings of the standard library

# Not documentation: tests, the bundled editor and its turtles, code page tables, other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
                    "pydoc_data", "encodings", "__pycache__", "__phello__", "_pyrepl"}


def python_documents():
    """Yield Python's own documentation: one text per language topic, then one per module, in a fixed order.

    Every machine with Python already has it, so the demo needs no download. Raises UserError if it is not installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.exists():
        raise UserError(f"this Python has no documentation ({topics} is missing); use a Python from python.org, "
                        "or your own text: prepare_text.py FILE_OR_DIR... --out data/NAME")
    dictionary = next(node.value for node in _parse_module(topics).body if isinstance(node, ast.Assign))
    for _, text in sorted(ast.literal_eval(dictionary).items()):
        yield text.strip() + "\n"
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith("config-"):
            text = _module_documentation(".".join(p for p in parts if p != "__init__"), _parse_module(path))
            if text:
                yield text


def _parse_module(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in old docstrings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):       # a template, or written for another Python version
            return ast.Module([], [])


def _module_documentation(name, module):
    """Return the docstrings of a module, its classes and functions in pydoc's layout; "" if there are none."""
    text = ast.get_docstring(module) or ""
    sections = [f"Help on module {name}:\n\n{text}"] if text else []
    sections += _docstring_sections(module, name + ".", "")
    return "\n\n".join(sections) + "\n" if sections else ""


def _docstring_sections(node, prefix, indent):
    sections = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(child)
        is_class = isinstance(child, ast.ClassDef)
        if text:
            head = f"class {prefix}{child.name}" if is_class else f"{prefix}{child.name}({ast.unparse(child.args)})"
            body = "\n".join(f"{indent}    {line}".rstrip() for line in text.splitlines())
            sections.append(f"{indent}{head}\n{body}")
        if is_class:
            sections += _docstring_sections(child, "", indent + "    ")
    return sections
