"""Two replicas on Ray Serve, on this machine."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")

REPO = Path(__file__).resolve().parents[2]
# As `serve run --app-dir serving ray_app:build replicas=2 gpus=0` does, on another port.
RUN = """
import sys, ray
from ray import serve
sys.path.insert(0, "serving")
import ray_app
ray.init("local", num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(ray_app.build(ray_app.Arguments(replicas=2, gpus=0)), blocking=True)
"""


@pytest.fixture
def url(model_folder, serving_fakes, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("team:secret\n")
    port = serving_fakes.free_port()
    variables = {"MODEL_NAME": model_folder, "API_KEYS_FILE": keys, "MAX_TOKENS": 16, "STEPS": 16}
    variables |= {"OMP_NUM_THREADS": 1, "RAY_USAGE_STATS_ENABLED": 0}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", RUN, str(port)]
        process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while "is ready at" not in log.read_text():  # both replicas are
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_two_replicas_answer_stream_refuse_and_stop_for_leaving_clients(url):
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=60) as client:
        ask = {"prompt": "a", "max_tokens": 12, "seed": 1}
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=ask), range(32)))
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        stream = client.post("/v1/completions", json=ask | {"stream": True}).text
        pieces = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert {"".join(piece["choices"][0]["text"] for piece in pieces)} == texts
        assert client.post("/v1/completions", json=ask | {"max_tokens": 0}).status_code == 400
        assert httpx.post(url + "/v1/completions", json=ask).status_code == 401

        def counts():
            """Of both replicas, by when each was begun."""
            found = {}
            for _ in range(40):
                lines = client.get("/metrics").text.splitlines()
                pairs = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
                found[pairs["coda_queue_seconds_created"]] = pairs
            return found.values()

        assert sum(float(pairs["coda_answer_tokens_total"]) > 0 for pairs in counts()) == 2, "one had nothing to do"
        long = {"prompt": "a", "max_tokens": 400, "steps": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as response:
            next(response.iter_lines())
        for _ in range(100):
            if sum(float(pairs["coda_cancelled_total"]) for pairs in counts()) == 1:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the model went on for a client that had left")
