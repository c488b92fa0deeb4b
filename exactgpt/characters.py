"""Read the characters in nanoGPT's meta.pkl without the pickle module, so that no code in the file can run.

The file is the pickle of {"vocab_size": n, "itos": {id: character}, "stoi": {character: id}}. To pickle such a dict
takes a few instructions that only make plain values; a file with any other instruction is refused.
"""
import pickletools

from exactgpt.config import UserError
from exactgpt.files import reading

META = "meta.pkl"
MAX_META_BYTES = 3 << 20      # 65,535 characters take 2.8 MB in protocol 0, the most verbose one
# The instructions of protocols 0 to 5, by what they do here.
PUSH = {"INT", "BININT", "BININT1", "BININT2", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
NUMBERS = range(1 << 16)
IGNORED = {"PROTO", "FRAME", "STOP"}


def read_characters(path):
    """Return the characters of a meta.pkl as one string, in the order of their ids. Raises UserError."""
    with reading(path), open(path, "rb") as f:
        data = f.read(MAX_META_BYTES + 1)
    try:
        if len(data) > MAX_META_BYTES:
            raise ValueError(f"it is larger than {MAX_META_BYTES >> 20} MB")
        stored = read_plain_pickle(data)
        itos, stoi, n = (stored[key] for key in ("itos", "stoi", "vocab_size"))
        characters = [itos[i] for i in range(n)]
        if not all(type(c) is str and len(c) == 1 for c in characters):
            raise ValueError("an entry of itos is not a single character")
        if len(itos) != n or stoi != {c: i for i, c in enumerate(characters)}:
            raise ValueError("itos and stoi do not have the same characters")
        return "".join(characters)
    except Exception as error:      # pickletools and the lines above may raise anything on garbage
        why = str(error) if type(error) is ValueError else "it is damaged or of another kind"
        raise UserError(f"{path} is not a vocabulary of characters as nanoGPT's prepare.py writes it ({why:.200}); "
                        "restore it") from error


def read_plain_pickle(data):
    """Return the value in a pickle (bytes) of dicts, strings and integers. Raises ValueError and others."""
    # A pickle is a program for a machine with a stack. pickletools lists its instructions without executing them.
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(data):
        name = opcode.name
        if name in PUSH:
            if type(value) is int and value not in NUMBERS:      # huge ones can be made to collide in a dict
                raise ValueError("a number in it is not between 0 and 65535")
            stack.append(value)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            start = len(stack) - 2 if name == "SETITEM" else marks.pop()
            items = stack[start:]
            del stack[start:]
            if name == "DICT":
                stack.append({})
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in PUT:
            memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in GET:
            stack.append(memo[value])
        elif name not in IGNORED:
            raise ValueError(f"its instruction {name} might run code")
    return stack[-1]
