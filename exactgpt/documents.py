"""Documents and rows from .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files, one at a time, trusting nothing.

`read_documents` gives the text of a corpus, `read_rows` some columns of a table. What cannot be read is a UserError
that names the file and the line. `python_documents` gives the documentation inside CPython itself, a corpus that every
machine with Python already has.
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

from exactgpt.config import UserError

PART_CHARS = 1 << 20       # a longer document comes in parts of about this many characters
PIECE_BYTES = 1 << 21      # what plan_reads makes a piece of
LARGE_GROUP = 1 << 24      # a row group of more bytes is too much for a worker's memory
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
                    raise UserError(f"{where}: {len(row)} cells, but {len(header)} in the header; quote cells that "
                                    "hold a separator")
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
    """A pyarrow ParquetFile that has the columns; it holds little of a column in memory. Raises UserError."""
    import pyarrow.parquet
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())       # the default one keeps what is freed: 30 MB a worker
    with _parquet_errors(path):
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    require_columns(columns, file.schema_arrow.names, path)
    return file


@contextlib.contextmanager
def _parquet_errors(path):
    try:
        yield
    except (OSError, ValueError) as error:      # pyarrow's errors are one or the other
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path} is not a readable parquet file ({reason})") from error


# None: plain text, no columns.
_FORMATS = {".txt": None, ".md": None, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
            ".parquet": _read_parquet}
_IN_DIRECTORIES = [suffix for suffix in _FORMATS if suffix != ".json"]   # stray .json files are settings, not text


# -----------------------------------------------------------------------------
# large files in pieces: a plan in one process, the reading in others

def plan_reads(path, column, start=0):
    """Yield (start, share, read, *args) for the pieces of a .parquet or .jsonl file, from `start` on, in order.

    start: where the piece begins (a row of a parquet file, a byte of a .jsonl file), with which a later call goes on.
    share: of the file before it, 0 to 1. read(*args), in any process, yields the piece's documents (text, True).
    Row groups of more than LARGE_GROUP are read here and their text travels, likewise the one that `start` lies in; all
    else is read where it is needed. Raises UserError.
    """
    return (_plan_parquet if Path(path).suffix == ".parquet" else _plan_jsonl)(str(path), column, start)


def _plan_jsonl(path, column, start):
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as f:
            while start < size:
                f.seek(start + PIECE_BYTES)
                f.readline()
                stop = min(f.tell(), size)
                yield start, start / size, read_lines, path, column, start, stop
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_lines(path, column, start, stop):
    """Yield (text, True) for the lines of a .jsonl file between two bytes. Raises UserError."""
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
            (text,) = parse_json_line(line, where, [column])
            yield text if type(text) is str else _to_text(text, where, column), True


def _plan_parquet(path, column, start):
    file = open_parquet(path, [column])
    kind = str(file.schema_arrow.field(column).type)
    if "string" not in kind or kind.startswith(("list", "struct", "map")):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text")
    n_rows = file.metadata.num_rows
    run, run_start, run_bytes = [], 0, 0        # consecutive row groups that are read as one piece
    for group, first, stop, size in _row_groups(file.metadata, column):
        if stop <= start:
            continue
        read_here = first < start or size > LARGE_GROUP
        if run and (read_here or run_bytes >= PIECE_BYTES):
            yield run_start, run_start / n_rows, read_row_groups, path, column, run
            run = []
        if read_here:
            batch_rows = max(1, (stop - first) * PIECE_BYTES // max(size, 1))
            for row, texts in _batches(file, path, column, group, first, start, batch_rows):
                yield row, row / n_rows, iter_texts, texts
            continue
        if not run:
            run_start, run_bytes = first, 0
        run.append(group)
        run_bytes += size
    if run:
        yield run_start, run_start / n_rows, read_row_groups, path, column, run


def _row_groups(metadata, column):
    """Yield (row group, its first row, the row after its last, bytes of the column uncompressed)."""
    first = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = (group.column(j) for j in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
        yield i, first, first + group.num_rows, size
        first += group.num_rows


def _batches(file, path, column, group, first, start, batch_rows):
    """Yield (row, texts) for the rows of a row group from `start` on."""
    with _parquet_errors(path):
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
            if first + len(batch) > start:
                begin = max(first, start)
                yield begin, batch.column(0).slice(begin - first).to_pylist()
            first += len(batch)


def read_row_groups(path, column, groups):
    """Yield (text, True) for the rows of some row groups of a parquet file. Raises UserError."""
    with _parquet_errors(path):
        file = _open_parquet_again(path, column)
        for batch in file.iter_batches(256, row_groups=groups, columns=[column], use_threads=False):
            yield from iter_texts(batch.column(0).to_pylist())


@functools.lru_cache(maxsize=1)
def _open_parquet_again(path, column):
    """The open file of the piece before: a footer of thousands of row groups takes a while to parse."""
    return open_parquet(path, [column])


def iter_texts(texts):
    """Yield (text, True) for each text of a list; a null is an empty document."""
    return ((text or "", True) for text in texts)


# -----------------------------------------------------------------------------
# the demo's corpus, about 2 MB: the language reference's topics (pydoc_data) and the standard library's docstrings

# Not documentation: tests, the bundled editor and its turtles, code page tables, other people's packages.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
            "pydoc_data", "encodings", "__pycache__", "__phello__", "_pyrepl"}


def python_documents():
    """Yield the documents (str) in a fixed order: one for each topic, one for each module. Raises UserError."""
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.exists():
        raise UserError(f"this Python came without its documentation ({topics} is missing); use one from python.org, "
                        "or bring your own text: prepare_text.py FILE_OR_DIR... --out data/NAME")
    dictionary = next(node.value for node in _parse(topics).body if isinstance(node, ast.Assign))
    for _, text in sorted(ast.literal_eval(dictionary).items()):
        yield text.strip() + "\n"
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            text = _module_text(".".join(p for p in parts if p != "__init__"), _parse(path))
            if text:
                yield text


def _parse(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in old docstrings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):       # a template, or a file of another Python
            return ast.Module([], [])


def _module_text(name, module):
    """The docstrings of a module, its classes and functions as pydoc lays them out; "" where there are none."""
    text = ast.get_docstring(module) or ""
    sections = [f"Help on module {name}:\n\n{text}"] if text else []
    sections += _definitions(module, name + ".", "")
    return "\n\n".join(sections) + "\n" if sections else ""


def _definitions(node, prefix, indent):
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
            sections += _definitions(child, "", indent + "    ")
    return sections
