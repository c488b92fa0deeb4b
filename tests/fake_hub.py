"""A local server that imitates the parts of the Hugging Face hub that hub.py uses, with errors on request."""
import contextlib
import hashlib
import http.server
import json
import threading
import time
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "89abcdef0123456789abcdef0123456789abcdef"


class FakeHub(http.server.ThreadingHTTPServer):
    """datasets: {id: {"files": {path: bytes}, "configs": [...], "converted": {path: bytes}, "error": (status, code)}}.

    faults: [(method, part of the path, fault)], each used once. A fault is a status, (status, headers), "hang", "cut",
    "damage", or the bytes of another response.
    requests: [(method, path)] in the order received.
    """
    daemon_threads = True

    def __init__(self, datasets, faults=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.datasets, self.faults, self.requests = datasets, list(faults), []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass        # some tests kill the client during a request


@contextlib.contextmanager
def serve(datasets, faults=()):
    """Return a context that runs a FakeHub in a thread."""
    server = FakeHub(datasets, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle("GET")

    def do_HEAD(self):
        self._handle("HEAD")

    def _handle(self, method):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        fault = self._next_fault(method, path)
        if fault == "hang":
            time.sleep(20)
            return
        if isinstance(fault, bytes):
            self._send(200, fault)
            return
        if isinstance(fault, (int, tuple)):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._send(status, b"{}", **headers)
            return
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name, rest = "/".join(parts[1 + is_api:3 + is_api]), parts[3 + is_api:]
        dataset = self.server.datasets.get(name)
        if dataset is None:
            self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif "error" in dataset:
            self._send(dataset["error"][0], b"{}", **{"X-Error-Code": dataset["error"][1]})
        elif not is_api:
            self._file(dataset["files"], rest[1], "/".join(rest[2:]), fault)
        elif rest[:1] == ["tree"]:
            self._tree(dataset["converted" if rest[1] == CONVERTED else "files"])
        elif rest[:1] == ["revision"] and "convert" in rest[-2] and "converted" not in dataset:
            self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        else:
            self._info(name, dataset, CONVERTED if rest[-1:] == ["parquet"] else COMMIT)

    def _next_fault(self, method, path):
        with self.server.lock:
            self.server.requests.append((method, path))
            for fault in self.server.faults:
                if fault[0] == method and fault[1] in path:
                    self.server.faults.remove(fault)
                    return fault[2]
        return None

    def _info(self, name, dataset, commit):
        info = {"id": name, "sha": commit, "siblings": []}
        if "configs" in dataset:
            info["cardData"] = {"license": "odc-by", "configs": dataset["configs"]}
        self._send(200, json.dumps(info).encode())

    def _tree(self, files):
        folders = [{"type": "directory", "path": folder, "oid": "0" * 40}
                   for folder in sorted({path.rpartition("/")[0] for path in files} - {""})]
        infos = [{"type": "file", "path": p, "size": len(data), "oid": "0" * 40,
                  "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
                 for p, data in {"README.md": b"", **files}.items()]
        self._send(200, json.dumps(folders + infos).encode())

    def _file(self, files, revision, path, fault):
        data = files[path]
        headers = {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if fault == "damage":
            body = body[:200] + bytes([body[200] ^ 255]) + body[201:]
        self._send(206 if start else 200, body, cut=fault == "cut", **headers)

    def _send(self, status, body, cut=False, **headers):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True
