"""A local server with the part of the hub's HTTP API that an upload uses. It keeps repositories in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories by name: {"private": bool, "files": {path: bytes}}; `stored` are large files by SHA-256.

    Attributes:
        requests: (method, path, token) of every request.
        fail_at: path part of requests that are answered by an error.
    """

    def __init__(self):
        self.repositories, self.stored, self.requests, self.fail_at = {}, {}, [], None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if self.hub.fail_at and self.hub.fail_at in self.path:
            return self._answer({"error": "try later"}, 400)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path.startswith("/lfs/"):
            self.hub.stored[path.removeprefix("/lfs/")] = self.body
            return self._answer({})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        parts = path.removeprefix("/api/models/").strip("/").removesuffix(".git/info/lfs/objects/batch").split("/")
        found = self.hub.repositories.get("/".join(parts[:2]))
        if found is None:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if path.endswith("objects/batch"):
            return self._answer(
                {"transfer": "basic", "objects": list(map(self._action, json.loads(self.body)["objects"]))}
            )
        return getattr(self, f"_{parts[2] if len(parts) > 2 else 'info'}")("/".join(parts[:2]), found)

    do_GET = do_POST = do_PUT = _handle  # noqa: N815

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = {"private": private, "files": {".gitattributes": b"*.safetensors filter=lfs"}}
        return self._answer({"url": f"{self.hub.url}/{name}"})

    def _info(self, name, found):
        self._answer({"id": name, "private": found["private"], "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, name, found):
        entries = []
        for path, content in found["files"].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if path.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(entries)

    def _preupload(self, name, found):
        files = json.loads(self.body)["files"]
        modes = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                  "shouldIgnore": False} for file in files]  # fmt: skip
        self._answer({"files": modes})

    def _action(self, wanted):
        here = wanted["oid"] in self.hub.stored
        upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
        return {**wanted, **({} if here else {"actions": upload})}

    def _commit(self, name, found):
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found["files"][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                found["files"][value["path"]] = self.hub.stored[value["oid"]]
        self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}"})
