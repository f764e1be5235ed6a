"""Files behind URLs: a file system of fsspec in memory, and a web server of this machine."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from nesso_tune import DataError, RunEnvironmentError, prepare_data
from nesso_tune.data import remote
from nesso_tune.data.files import is_local
from nesso_tune.data.sources import is_cached, source_records
from nesso_tune.recipes.sections import Source

ROWS = [{"prompt": f"Perché {i}?", "response": f"Così: {i}."} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """With a network, and without what this process has listed before."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    remote._remote_files.cache_clear()
    yield
    remote._remote_files.cache_clear()


@pytest.fixture
def bucket():
    """Writes files into the memory of fsspec; returns their URL."""
    store = fsspec.filesystem("memory")

    def write(**files):
        for name, content in files.items():
            store.pipe_file(f"/bucket/{name.replace('__', '/').replace('_', '.')}", content)
        return "memory://bucket"

    yield write
    store.rm("/bucket", recursive=True)


@pytest.fixture
def server(tmp_path):
    """A web server of a folder; returns the folder and its URL."""
    (tmp_path / "web").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web"))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def read(path, **keys):
    remote._remote_files.cache_clear()
    return list(source_records(Source(path=path, **keys)))


def test_a_file_in_a_store(bucket):
    url = f"{bucket(rows_jsonl=LINES)}/rows.jsonl"
    assert not is_local(url)
    assert not is_cached(Source(path=url))
    read_rows = read(url)
    assert [row for row, _ in read_rows] == ROWS
    assert read_rows[2][1] == "memory://bucket/rows.jsonl:3"
    assert is_cached(Source(path=url))


def test_a_folder_and_a_pattern_with_splits(bucket):
    csv = b"prompt;response\nq;a\n"
    url = bucket(train_csv=csv, dev_jsonl=LINES, README_md=b"# x", _ipynb__rows_jsonl=LINES)
    assert [row for row, _ in read(url)] == [{"prompt": "q", "response": "a"}]
    assert [row for row, _ in read(url, split="validation")] == ROWS
    assert [row for row, _ in read(f"{url}/*.jsonl")] == ROWS
    with pytest.raises(DataError, match=r"there is no data file"):
        read(f"{url}/*.parquet")
    with pytest.raises(DataError, match=r"there is no such file; check the URL"):
        read(f"{url}/rows.json")


def test_a_changed_file_is_downloaded_again_and_an_unchanged_one_is_not(bucket, sft, caplog):
    caplog.set_level("INFO", "nesso_tune")
    url = f"{bucket(rows_jsonl=LINES)}/rows.jsonl"
    first = prepare_data(sft(url)).summary
    remote._remote_files.cache_clear()
    assert prepare_data(sft(url)).summary.cache_hit
    assert caplog.text.count("downloading memory://bucket/rows.jsonl") == 1
    bucket(rows_jsonl=LINES + LINES)
    remote._remote_files.cache_clear()
    second = prepare_data(sft(url)).summary
    assert caplog.text.count("downloading") == 2
    assert (first.rows_read, second.rows_read) == (5, 10)
    assert first.fingerprint != second.fingerprint


def test_a_file_of_a_web_server(server, tmp_path, sft, write_rows):
    folder, url = server
    (folder / "rows.jsonl").write_bytes(LINES)
    assert [row for row, _ in read(f"{url}/rows.jsonl?download=true")] == ROWS
    data = prepare_data(sft(f"{url}/rows.jsonl"))
    assert data.summary.fingerprint == prepare_data(sft(write_rows(ROWS, "local.jsonl"))).summary.fingerprint
    with pytest.raises(DataError, match=r"absent.jsonl: the server answers 404 .*; check the URL"):
        read(f"{url}/absent.jsonl")


def test_without_a_network_the_last_copy_is_used(server, caplog, monkeypatch):
    folder, url = server
    (folder / "rows.jsonl").write_bytes(LINES)
    read(f"{url}/rows.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", partial(pytest.fail, "no network is used"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert [row for row, _ in read(f"{url}/rows.jsonl")] == ROWS
    assert not caplog.text
    gone = "http://127.0.0.1:9/rows.jsonl"
    with pytest.raises(RunEnvironmentError, match=r"cannot be read \(URLError: .*\); check network and credentials"):
        read(gone)
    remote._folder(f"{url}/rows.jsonl", "train").rename(remote._folder(gone, "train"))
    assert [row for row, _ in read(gone)] == ROWS
    assert "using the last copy" in caplog.text


@pytest.mark.parametrize(("url", "package"), [("s3://b/rows.jsonl", "s3fs"), ("gs://b/rows.jsonl", "gcsfs")])
def test_the_package_of_a_store_is_named_with_its_version(url, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(RunEnvironmentError, match=rf"; pip install {package}=={fsspec.__version__}$"):
        read(url)


def test_unknown_urls():
    with pytest.raises(DataError, match=r"`xyz://` is not a known kind of URL; use s3, gs, hf or https"):
        read("xyz://b/rows.jsonl")
