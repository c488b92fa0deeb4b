"""Read documents, or some columns of a table, from .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files.

Nothing in a file is trusted: a bad file raises a UserError that names the file and, if possible, the line.

To add an input format, write a function like `_read_csv` and add its suffix to the table READERS.
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
from exactgpt.files import read_json

PART_CHARS = 1 << 20       # a longer .txt or .md document is yielded in parts of about this many characters
RESUMABLE = (".parquet", ".jsonl")      # the formats that read_texts can continue in the middle
_SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def find_files(paths):
    """Return the files in a list of files and directories, which are searched in sorted order. Raises UserError."""
    suffixes = set(READERS) - {".json"}     # stray .json files are settings, not text
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
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
    rest, starts = "", True
    overlap = len(separator) - 1 if separator else 0    # a separator may begin here and end in the next chunk
    with _open(path) as f:
        while chunk := f.read(PART_CHARS):
            if "\0" in chunk:
                raise UserError(f"{path} is a binary file (it contains zero bytes); use a text file")
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
def _open(path, mode="r", newline=None):
    """Open a file (text must be UTF-8) and turn errors while it is read into UserErrors."""
    try:
        with open(path, mode, encoding=None if "b" in mode else "utf-8-sig", newline=newline) as f:
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (it contains the byte {error.object[error.start]:#04x}); convert it "
                        "first, for instance with iconv -f latin1 -t utf-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_rows(path, columns):
    """Yield the values of the named columns of each row as a tuple of str; null becomes "". Raises UserError."""
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} has no columns; use one of {', '.join(k for k, v in READERS.items() if v)}")
    for where, values in reader(path, columns):
        yield tuple(_to_text(value, where, column) for value, column in zip(values, columns))


def _to_text(value, where, column):
    """Return a cell as text, with U+FFFD for lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    if not isinstance(value, (str, int, float, type(None))):
        raise UserError(f"{where}: column {column!r} contains a {type(value).__name__}, not text")
    text = "" if value is None else str(value)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_columns(columns, present, where):
    for column in columns:
        if column not in present:
            hint = "; choose one with --text_column" + " and --label_column" * (len(columns) > 1)
            raise UserError(f"{where}: no column {column!r} among {', '.join(map(str, present)) or 'none'}{hint}")


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
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as f:
        reader = csv.reader(f, **dialect)
        try:
            header = next(reader, [])
            _check_columns(columns, header, path)
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


def _read_parquet(path, columns):
    import pyarrow.parquet
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())   # the default pool keeps freed memory
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)     # for little memory
        _check_columns(columns, file.schema_arrow.names, path)
        for batch in file.iter_batches(256, columns=columns, use_threads=False):
            for values in zip(*(column.to_pylist() for column in batch.columns)):
                yield path, values
    except (OSError, ValueError) as error:      # every pyarrow error is one of these
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path} is not a readable parquet file ({reason})") from error


# File suffix -> function(path, columns) that yields (place for messages, values of the columns) for each row. None:
# plain text without columns.
READERS = {".txt": None, ".md": None, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv,
           ".tsv": functools.partial(_read_csv, delimiter="\t", quoting=csv.QUOTE_NONE), ".parquet": _read_parquet}


# ---- files that are continued in the middle ----------------------------------

def read_texts(path, column, start=0):
    """Yield (start, text) from `start` on: a row's number in a .parquet file, its first byte in a .jsonl file."""
    if str(path).endswith(".parquet"):
        for row, (_, (text,)) in enumerate(_read_parquet(path, [column])):
            if not isinstance(text, (str, type(None))):
                raise UserError(f"{path}: column {column!r} contains {type(text).__name__} values, not text")
            if row >= start:
                yield row, text or ""
        return
    with _open(path, "rb") as f:
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
