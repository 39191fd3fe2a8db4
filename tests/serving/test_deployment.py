"""What is shipped to run the server with: the image's files, compose, the unit, and nginx in front of two replicas."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
import yaml

from coda_serving.settings import ServerSettings

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "serving/fast-api"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
DEFAULTS = ServerSettings(model_name="org/model", _env_file=None)
URL, ASK = "/v1/completions", {"prompt": "hi"}


# -- files -----------------------------------------------------------------------------------------------------------


def copied() -> list[str]:
    """Sources of the Dockerfile's COPY lines."""
    text = (REPO / "serving/Dockerfile").read_text()
    return [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]


def is_ignored(path: str) -> bool:
    """By .dockerignore: its last pattern that fits the path or a folder of it decides."""
    ignored = False
    for line in (REPO / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, parts = line.removeprefix("!"), path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        names = parts if pattern.startswith("**/") else heads
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
            ignored = not line.startswith("!")
    return ignored


def test_the_image_is_made_of_files_that_exist_and_are_sent_to_the_builder():
    assert "constraints.txt" in copied()
    for source in copied():
        assert (REPO / source).exists(), source
        assert not is_ignored(source), source
    for private in (".git", "runs/model", ".venv/bin/python", "serving/fast-api/.env", "keys", "README.md"):
        assert is_ignored(private), private
    assert is_ignored("CoDALanguageModel/__pycache__/row.pyc")


def test_the_image_installs_what_the_extra_does_at_the_versions_of_the_tests():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = (REPO / "serving/requirements.txt").read_text().splitlines()
    extra = project["dependencies"] + project["optional-dependencies"]["serving"]
    assert sorted(line for line in lines if line[0] != "#") == sorted(extra)
    dockerfile = (REPO / "serving/Dockerfile").read_text()
    assert dockerfile.index("PIP_CONSTRAINT=/app/constraints.txt") < dockerfile.index("RUN ")


def replicas() -> dict[int, str]:
    """GPU by port, as nginx.conf has them."""
    ports = re.findall(r"^\s*server 127\.0\.0\.1:(\d+)", (FOLDER / "nginx.conf").read_text(), re.MULTILINE)
    return {int(port): port[-1] for port in ports}


def test_compose_starts_the_replicas_that_nginx_looks_for():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    found = {}
    for service in services.values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert source.startswith("${") or (FOLDER / source).is_file(), source
        if "environment" not in service:
            continue
        build = service["build"]
        assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
        assert service["environment"].keys() <= {name.upper() for name in ServerSettings.model_fields}
        assert int(service["stop_grace_period"].removesuffix("s")) > DEFAULTS.drain_timeout_s
        (gpu,) = service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        found[int(service["environment"]["PORT"])] = gpu
    assert found == replicas()


def test_the_unit_starts_the_replicas_that_nginx_looks_for(tmp_path):
    text = (FOLDER / "coda-serving@.service").read_text()
    assert "PORT=801%i CUDA_VISIBLE_DEVICES=%i" in text
    assert all(str(port) == f"801{gpu}" for port, gpu in replicas().items())
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1]) > DEFAULTS.drain_timeout_s
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "coda-serving@0.service"
        unit.write_text(text.replace("/opt/coda/.venv/bin/python", sys.executable))
        result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_proxys_limits_are_those_of_the_server():
    text = (FOLDER / "nginx.conf").read_text()
    limits = dict(re.findall(r"^\s*(client_max_body_size|proxy_read_timeout) (\d+)[ms];", text, re.MULTILINE))
    assert int(limits["client_max_body_size"]) << 20 == DEFAULTS.max_body_bytes
    assert int(limits["proxy_read_timeout"]) > DEFAULTS.request_timeout_s


# -- nginx -----------------------------------------------------------------------------------------------------------


@contextmanager
def proxy(folder: Path, ports: tuple[int, int], free_port: int, *, sticky: bool = False):
    """nginx with the shipped configuration on other ports; gives its address and its log."""
    text = (FOLDER / "nginx.conf").read_text().replace("listen 8000;", f"listen 127.0.0.1:{free_port};")
    for shipped, port in zip(replicas(), ports, strict=True):
        text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{port}")
    if sticky:
        text = text.replace("    least_conn;\n    # hash", "    hash")
        assert "least_conn" not in text
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    log = folder / "error.log"
    (folder / "coda.conf").write_text(text)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {log} warn;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + f"events {{}}\nhttp {{\naccess_log off;\n{temporary}include {folder}/coda.conf;\n}}\n"
    )
    process = subprocess.Popen([NGINX, "-e", str(log), "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        for _ in range(500):
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", free_port)) == 0:
                    break
            time.sleep(0.01)
        yield f"http://127.0.0.1:{free_port}", log
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def behind(tmp_path, serving_fakes):
    """Give a function that starts nginx in front of two replicas, each an app, a port, or None for a port unused."""
    if NGINX is None:
        pytest.skip("needs nginx")
    with ExitStack() as stack:

        def start(*apps, **options):
            ports = tuple(app if isinstance(app, int) else serving_fakes.free_port() for app in apps)
            for app, port in zip(apps, ports, strict=True):
                if callable(app):
                    stack.enter_context(serving_fakes.served(app, port))
            return stack.enter_context(proxy(tmp_path, ports, serving_fakes.free_port(), **options))

        yield start


def test_streams_pass_the_proxy_as_they_come_and_leaving_clients_too(behind, serving_fakes):
    sampler = serving_fakes.FakeSampler(lambda request: b"x" * 20, step_s=0.05)
    url, _ = behind(serving_fakes.make_app(sampler), serving_fakes.make_app(sampler))
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 20, "n": 8}
    steps = []
    with httpx.stream("POST", url + "/v1/chat/completions", json=chat, timeout=30) as response:
        for line in response.iter_lines():
            steps += [len(sampler.sizes)] if line else []
    assert steps[0] <= 2, "the first event was held back"
    assert len(set(steps)) > 8, "events were held back"
    for stream in (True, False):
        num_steps = len(sampler.sizes)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
            content = json.dumps(ASK | {"stream": stream, "max_tokens": 32}).encode()
            head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            while len(sampler.sizes) < num_steps + 3:
                time.sleep(0.01)
        time.sleep(1)
        assert len(sampler.sizes) < num_steps + 20, "the model went on for a client that had left"


async def draining(scope, receive, send):
    """A replica that answers 503."""
    if scope["type"] == "lifespan":
        for stage in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{stage}.complete"})
        return
    await send({"type": "http.response.start", "status": 503, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("kind", ["away", "hangs up", "drains"])
def test_a_replica_that_cannot_answer_is_passed_over(behind, serving_fakes, kind):
    sampler = serving_fakes.FakeSampler()
    with socket.socket() as listener:
        other = {"away": None, "drains": draining}.get(kind)
        if kind == "hangs up":
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            other = listener.getsockname()[1]

            def hang_up():
                while True:
                    try:
                        connection = listener.accept()[0]
                    except OSError:
                        return
                    connection.recv(10)
                    connection.close()

            threading.Thread(target=hang_up, daemon=True).start()
        url, log = behind(other, serving_fakes.make_app(sampler))
        answers = [httpx.post(url + URL, json=ASK, timeout=30) for _ in range(4)]
        listener.close()
    assert [answer.json()["choices"][0]["text"] for answer in answers] == ["hello"] * 4
    assert len(sampler.batches) == 4
    if kind != "drains":
        assert "upstream" in log.read_text(), "it was never tried"


def test_the_proxys_own_answers_are_json_and_metrics_are_each_replicas_own(behind):
    url, log = behind(None, None)
    away = httpx.post(url + URL, json=ASK, timeout=30)
    assert (away.status_code, away.json()["error"]["code"], away.headers["retry-after"]) == (503, "no_replica", "5")
    large = httpx.post(url + URL, content=b" " * (DEFAULTS.max_body_bytes + 1), timeout=30)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(url + "/metrics").status_code == 404
    whole = httpx.post(url + URL, content=b" " * DEFAULTS.max_body_bytes, timeout=30)
    assert whole.status_code == 503
    assert "temporary file" not in log.read_text(), "a prompt was written to a disk"


def test_equal_beginnings_go_to_one_replica_where_that_is_asked_for(behind, serving_fakes):
    samplers = [serving_fakes.FakeSampler(), serving_fakes.FakeSampler()]
    url, _ = behind(*map(serving_fakes.make_app, samplers), sticky=True)
    for system in "abcdefgh":
        before = [len(sampler.batches) for sampler in samplers]
        for turn in "123":
            messages = [{"role": "system", "content": system * 1100}, {"role": "user", "content": turn}]
            body = {"messages": messages}
            assert httpx.post(url + "/v1/chat/completions", json=body, timeout=30).status_code == 200
        gained = [len(sampler.batches) - n for sampler, n in zip(samplers, before, strict=True)]
        assert sorted(gained) == [0, 3]
    assert all(sampler.batches for sampler in samplers)
