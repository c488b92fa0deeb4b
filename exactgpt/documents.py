"""Read documents, or some columns of a table, from .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files.

Nothing in a file is trusted: a bad file raises a UserError that names the file and, if possible, the line.

To add an input format, write a function like `_read_csv` and add its suffix to the table READERS.
"""
import ast
import codecs
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import sysconfig
import warnings
from pathlib import Path

from exactgpt.config import UserError, counted
from exactgpt.files import open_file, read_json, reading
from exactgpt.formats import HEAD, find_mismatch

PART_CHARS = 1 << 20       # a longer .txt or .md document is yielded in parts of about this many characters
CELL_CHARS = 1 << 26       # the longest cell of a .csv file; an unclosed quote must not fill the memory
RESUMABLE = (".parquet", ".jsonl")      # the formats that read_texts can continue in the middle
_SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def find_files(paths):
    """Return the files in a list of files and directories, which are searched in sorted order. Raises UserError."""
    suffixes = set(READERS) - {".json"}     # stray .json files are settings, not text
    found = []
    for path in map(Path, paths):
        with reading(path):
            if path.is_dir():
                inside = sorted(p for p in _walk(path) if p.suffix.lower() in suffixes and p.is_file())
                if not inside:
                    raise UserError(f"no text files in {path} (looked for {', '.join(sorted(suffixes))})")
                found += inside
            elif not path.exists():
                raise UserError(f"{path} does not exist")
            elif path.suffix.lower() not in READERS:
                raise UserError(f"cannot read {path}: it must end in one of {', '.join(READERS)}")
            else:
                found.append(path)
    return found


def _walk(folder):
    """Yield the paths of the files below a folder, hidden ones excepted. Raises OSError: nothing is left out."""
    def fail(error):
        raise error
    for here, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def read_documents(path, text_column="text", separator=None):
    """Yield (text, starts) for the documents of a file, in order. Raises UserError.

    A .txt or .md file is one document, or several if `separator` is given. A long document is yielded in parts; starts
    is False for all but the first. Other files have one document per row, in the column `text_column`.
    """
    # Parts end between a character and the whitespace after it. No match of GPT-2's split pattern spans such a place,
    # so the parts together have the token ids of the whole.
    if READERS[Path(path).suffix.lower()]:
        yield from ((text, True) for (text,) in read_rows(path, [text_column]))
        return
    rest, starts, searched = "", True, 0        # searched: so many characters of `rest` hold no such place
    overlap = len(separator) - 1 if separator else 0    # a separator may begin here and end in the next chunk
    with _open(path) as f:
        while chunk := f.read(PART_CHARS):
            if "\0" in chunk:
                raise UserError(f"{path} is a binary file (it contains zero bytes); use a text file")
            begin = max(0, len(rest) - overlap)
            rest += chunk
            if separator:
                *documents, tail = rest[begin:].split(separator)
                if documents:
                    documents[0] = rest[:begin] + documents[0]
                    for document in documents:
                        yield document, starts
                        starts = True
                    rest, searched = tail, 0
            if len(rest) > PART_CHARS:
                end = len(rest) - overlap
                cut = _SAFE_CUT.match(rest, searched, end)
                if cut:
                    yield rest[:cut.end()], starts
                    rest, starts = rest[cut.end():], False
                    end -= cut.end()
                searched = end - 1
    if rest:
        yield rest, starts


def read_files(files, text_column="text", separator=""):
    """Yield (text, starts) for the documents of files, in order, as `read_documents` does; blank ones are skipped.

    separator: as it can be typed in any shell, with \\n and \\t for newline and tab.
    """
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    for path in files:
        for text, starts in read_documents(path, text_column, separator):
            if not starts or (text and not text.isspace()):
                yield text, starts


@contextlib.contextmanager
def _open(path, binary=False, newline=None):
    """Open a file, whose text must be UTF-8, and turn errors while it is read into UserErrors."""
    with reading(path), open_file(path) as f:
        mismatch = find_mismatch(f.peek(HEAD)[:HEAD], path)
        if mismatch:
            raise UserError(mismatch)
        yield f if binary else io.TextIOWrapper(f, "utf-8-sig", newline=newline)


def read_rows(path, columns):
    """Yield the values of the named columns of each row as a tuple of str; null becomes "". Raises UserError."""
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} has no columns; use one of {', '.join(k for k, v in READERS.items() if v)}")
    for where, values in reader(path, columns):
        yield tuple(_to_text(value, where, column) for value, column in zip(values, columns))


def _to_text(value, where, column):
    """Return a cell as text: true and false as JSON writes them, "" for null, and U+FFFD for lone surrogates."""
    if not isinstance(value, (str, int, float, type(None))):
        raise UserError(f"{where}: column {column!r} contains a {type(value).__name__}, not text")
    if isinstance(value, bool):
        return json.dumps(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""       # pandas writes null as NaN
    text = str(value)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:      # JSON can escape a lone surrogate, but UTF-8 cannot encode it
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_columns(columns, present, where):
    for column in columns:
        if column not in present:
            hint = "; choose one with --text_column" + " and --label_column" * (len(columns) > 1)
            raise UserError(f"{where}: no column {column!r} among {', '.join(map(str, present)) or 'none'}{hint}")
        if isinstance(present, list) and present.count(column) > 1:
            raise UserError(f"{where}: {present.count(column)} columns are named {column!r}; rename one of them")


def read_objects(path):
    """Yield (place, object) for each object in a .json list, or in any other file one a line. Raises UserError."""
    if Path(path).suffix.lower() == ".json":
        for i, value in enumerate(read_json(path, list), 1):
            yield f"{path}, item {i}", _require_object(value, f"{path}, item {i}")
    else:
        with _open(path) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parse_object(line, f"{path}, line {number}")


def _parse_object(line, where):
    """Return the object in one line of JSON (str or bytes). Raises UserError that names the place `where`."""
    try:
        return _require_object(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _require_object(value, where):
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, but is a {type(value).__name__}")
    return value


def _read_json(path, columns):
    for where, value in read_objects(path):
        _check_columns(columns, value, where)
        yield where, [value[c] for c in columns]


def _read_csv(path, columns, **dialect):
    csv.field_size_limit(CELL_CHARS)
    with _open(path, newline="") as f:
        reader = csv.reader(f, strict=True, **dialect)
        begin = 1       # the line where the row begins
        try:
            header = next(reader, [])
            _check_columns(columns, header, path)
            indices = [header.index(c) for c in columns]
            begin = reader.line_num + 1
            for row in reader:
                where = f"{path}, line {begin}"
                begin = reader.line_num + 1
                if row and len(row) != len(header):
                    raise UserError(f"{where}: {counted(len(row), 'cell')}, but {len(header)} in the header; quote "
                                    "cells that contain the separator")
                if row:
                    yield where, [row[i] for i in indices]
        except csv.Error as error:
            raise UserError(f"{path}, line {begin}: the row that begins here is not valid CSV ({error}); close each "
                            "quoted cell, and double the quotes inside it") from error


# ---- parquet -----------------------------------------------------------------

# A few kilobytes can ask for terabytes: compressed zeros, or one long value that a million rows refer to. No text is
# packed that tightly.
UNPACKED_RATIO, UNPACKED_BYTES = 1000, 64 << 20     # a file may hold this many times its size, or this much
ROW_BYTES = 64             # what a value costs Python, besides its text
BATCH_ROWS, BATCH_BYTES = 256, 128 << 20            # rows that are unpacked at once, and the most that they may take
# How a page begins, in Thrift's compact format: its kind (data, dictionary, data of version 2) and its unpacked size.
_PAGE = re.compile(rb"\x15([\0\x04\x06])\x15([\x80-\xff]{0,4}[\0-\x7f])")


def _read_parquet(path, columns):
    import pyarrow.parquet
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())   # the default pool keeps freed memory
    with _open(path, binary=True) as f:
        try:
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)     # for little memory
            _check_columns(columns, file.schema_arrow.names, path)
            for column in columns:
                kind = file.schema_arrow.field(column).type
                if not _is_text(kind):
                    raise UserError(f"{path}: column {column!r} contains {str(kind)[:100]}, not text")
            for batch in _parquet_batches(f, path, file, columns):
                for values in zip(*batch):
                    yield path, values
        except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:     # all that pyarrow raises
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(f"{path} is not a readable parquet file ({reason})") from error


def _is_text(kind):
    from pyarrow import types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_floating(kind) or str(kind) in ("string", "large_string", "string_view",
                                                                              "bool", "null")


def _parquet_batches(f, path, file, columns):
    """Yield the values of some rows, a list for each column. Raises UserError for more than the file can hold."""
    import pyarrow
    allowed = max(UNPACKED_BYTES, UNPACKED_RATIO * os.fstat(f.fileno()).st_size)

    def require(n_bytes):
        if n_bytes > allowed:
            raise UserError(f"{path} unpacks to more than {UNPACKED_RATIO:,} times its size, as no text does; use "
                            "another file")
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    leaves = [i for i, leaf in enumerate(file.schema) if leaf.path in columns]
    require(sum(group.total_byte_size for group in groups))
    require(ROW_BYTES * file.metadata.num_rows)
    unpacked = 0
    for i, group in enumerate(groups):
        for k, batch in enumerate(file.iter_batches(1, [i], columns, use_threads=False)):
            if k == 0:      # not earlier: column() aborts Python on bad metadata, which the first row would have shown
                longest = max(_longest_repeated(f, group.column(leaf)) for leaf in leaves)
                file.reader.set_batch_size(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, longest))))
            cells = [batch.column(column) for column in columns]
            cells = [c.dictionary_decode() if isinstance(c, pyarrow.DictionaryArray) else c for c in cells]
            unpacked += sum(c.nbytes for c in cells)
            require(unpacked)
            yield [c.to_pylist() for c in cells]


def _longest_repeated(f, chunk):
    """Return how many bytes the longest value of a column chunk may have that many rows can share; 0: none can."""
    if "DELTA_BYTE_ARRAY" in chunk.encodings:       # a value may repeat the one before it
        return chunk.total_uncompressed_size
    f.seek(min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset))
    page = _PAGE.match(f.read(16))
    if page is None:                                # written in an unusual way
        return BATCH_BYTES
    kind, size = page.groups()
    is_dictionary = kind == b"\x04"
    return sum((byte & 127) << 7 * i for i, byte in enumerate(size)) // 2 * is_dictionary


# File suffix -> function(path, columns) that yields (place for messages, values of the columns) for each row. None:
# plain text without columns.
READERS = {".txt": None, ".md": None, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv,
           ".tsv": functools.partial(_read_csv, delimiter="\t", quoting=csv.QUOTE_NONE), ".parquet": _read_parquet}


# ---- files that are continued in the middle ----------------------------------

def read_texts(path, column, start=0):
    """Yield (start, text) from `start` on: a row's number in a .parquet file, its first byte in a .jsonl file."""
    if str(path).endswith(".parquet"):
        for row, (_, (value,)) in enumerate(_read_parquet(path, [column])):
            if row >= start:
                yield row, value if isinstance(value, str) else _to_text(value, path, column)
        return
    with _open(path, binary=True) as f:
        f.seek(start)
        for line in f:
            where, data = f"{path}, byte {start:,}", line.removeprefix(codecs.BOM_UTF8 if start == 0 else b"")
            if data.strip():
                value = _parse_object(data, where)
                _check_columns([column], value, where)
                yield start, _to_text(value[column], where, column)
            start += len(line)


# ---- text for --demo: Python's language reference and docstrings, about 2 MB that need no download -----

# Not documentation: tests, the bundled editor and its turtles, code page tables, other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
                    "pydoc_data", "encodings", "__pycache__", "__phello__", "_pyrepl"}


@functools.cache
def python_documents():
    """Return Python's own documentation: one text per language topic, then one per module. Raises UserError."""
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.exists():
        raise UserError(f"this Python has no documentation ({topics} is missing); use a Python from python.org, "
                        "or your own text: prepare_text.py FILE_OR_DIR... --out data/NAME")
    dictionary = next(node.value for node in _parse_module(topics).body if isinstance(node, ast.Assign))
    texts = [text.strip() + "\n" for _, text in sorted(ast.literal_eval(dictionary).items())]
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith("config-"):
            name, module = ".".join(p for p in parts if p != "__init__"), _parse_module(path)
            text = ast.get_docstring(module)
            sections = [f"Help on module {name}:\n\n{text}"] if text else []
            sections += _docstring_sections(module, name + ".", "")
            texts += ["\n\n".join(sections) + "\n"] if sections else []
    return texts


def _parse_module(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in old docstrings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):       # a template, or written for another Python version
            return ast.Module([], [])


def _docstring_sections(node, prefix, indent):
    """Return the docstrings of the classes and functions in a syntax tree, each a text in pydoc's layout."""
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
