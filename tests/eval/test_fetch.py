"""Only the whole, known file ever has its name; what was begun goes on; the rest is refused with its place."""

import gzip
import hashlib
import http.server
import threading

import pytest

from coda_eval import fetch
from coda_eval.data import SOURCES
from CoDALanguageModel.errors import UserError

CONTENT = b'{"task_id": "a"}\n' * 5000


@pytest.fixture
def home():
    """A server with one file that breaks off after `home.stops` bytes, and the requests that it got."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        body, stops, ranges = CONTENT, None, True

        def do_GET(self):  # noqa: N802  http.server's name
            seen.append(self.headers.get("Range"))
            if self.path != "/file":
                self.send_error(404)
                return
            start = int((seen[-1] or "bytes=0-")[6:-1]) if self.ranges else 0
            if start >= len(self.body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
            self.send_header("Content-Length", str(len(self.body) - start))
            self.end_headers()
            self.wfile.write(self.body[start : type(self).stops])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.url, Handler.seen = f"http://127.0.0.1:{server.server_address[1]}/file", seen
        yield Handler
        server.shutdown()


def a_file(home, **changed):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return fetch.File(**{"name": "x.jsonl", "url": home.url, "licence": "MIT", "sha256": sha256, **changed})


def test_a_file_arrives_whole_and_is_fetched_once(home, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert fetch.fetch(a_file(home), folder) is True
    assert fetch.fetch(a_file(home), folder) is False
    assert (folder / "x.jsonl").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["x.jsonl"]
    assert home.seen == [None]


def test_what_broke_off_goes_on(home, tmp_path):
    home.stops = 1000
    with pytest.raises(UserError, match="broke off with 84000 bytes to come: fetch again to go on"):
        fetch.fetch(a_file(home), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part.x.jsonl"]
    home.stops = None
    assert fetch.fetch(a_file(home), tmp_path)
    assert home.seen == [None, "bytes=1000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_server_without_ranges_is_asked_from_the_start(home, tmp_path):
    home.ranges = False
    (tmp_path / "part.x.jsonl").write_bytes(CONTENT[:1000])
    assert fetch.fetch(a_file(home), tmp_path)
    assert (tmp_path / "x.jsonl").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_taken(home, tmp_path):
    (tmp_path / "part.x.jsonl").write_bytes(CONTENT)
    assert fetch.fetch(a_file(home), tmp_path)


def test_the_hash_is_of_the_content_whatever_packed_it(home, tmp_path):
    home.body = gzip.compress(CONTENT, 1)
    assert fetch.fetch(a_file(home, name="x.jsonl.gz"), tmp_path)
    home.body = gzip.compress(CONTENT, 1)[:-20]
    with pytest.raises(UserError, match="gave another file than the one that is known .*: nothing kept"):
        fetch.fetch(a_file(home, name="y.jsonl.gz"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl.gz"]


def test_another_file_is_not_kept_and_not_overwritten(home, tmp_path):
    home.body = CONTENT + b"\n"
    with pytest.raises(UserError, match="gave another file than the one that is known"):
        fetch.fetch(a_file(home), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.jsonl").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there and is not the published file"):
        fetch.fetch(a_file(home), tmp_path)
    assert (tmp_path / "x.jsonl").read_bytes() == b"mine"


def test_a_home_that_gives_without_end_and_a_folder_that_is_none_are_told(home, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CHUNK", 1000)
    monkeypatch.setattr(fetch, "MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(UserError, match="which no set has: nothing kept"):
        fetch.fetch(a_file(home), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be made: .*File exists"):
        fetch.fetch(a_file(home), tmp_path / "file")


def test_the_command_names_what_failed_and_fetches_the_rest(home, tmp_path, monkeypatch, capsys):
    gone = a_file(home, name="y.jsonl", url=f"{home.url}s")
    monkeypatch.setattr(fetch, "FILES", {"gone": gone, "x": a_file(home)})
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path))
    with pytest.raises(UserError, match="gone: .* cannot be had: HTTP Error 404"):
        fetch.main([])
    assert capsys.readouterr().out == f"x: fetched, {tmp_path / 'x.jsonl'}; licence: MIT\n"
    with pytest.raises(UserError, match="unknown set 'xx'; did you mean 'x'"):
        fetch.main(["xx"])
    with pytest.raises(
        UserError, match="bigcodebench is not fetched: no hash .* https://huggingface.co/datasets/bigcode"
    ):
        fetch.main(["x", "bigcodebench"])
    monkeypatch.delenv("CODA_EVAL_DATA")
    with pytest.raises(UserError, match="where to. Set CODA_EVAL_DATA to a folder, or give --data_dir"):
        fetch.main([])


def test_fetched_files_are_where_the_tasks_look():
    wanted = {name for source in SOURCES.values() for name in source.files}
    assert {file.name.removesuffix(".gz") for file in fetch.FILES.values()} <= wanted


def test_the_known_hashes_are_those_of_the_shared_files(coda_shared):
    checked = 0
    for file in fetch.FILES.values():
        for path in (coda_shared / "data").glob(f"*/{file.name.removesuffix('.gz')}*"):
            assert fetch.content_hash(path) == file.sha256, file.name
            checked += 1
    assert checked == len(fetch.FILES) - 1  # CRUXEval is not among them


def test_a_home_that_cannot_be_reached_is_told(tmp_path):
    file = fetch.File(name="x", url="http://127.0.0.1:9/x", licence="MIT", sha256="")
    with pytest.raises(UserError, match="http://127.0.0.1:9/x cannot be had: .*fetch again to go on"):
        fetch.fetch(file, tmp_path)
