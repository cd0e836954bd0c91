"""The reward server against clients that are strangers, slow, too many, or gone."""

import base64
import io
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from helpers import ROOT
from PIL import Image

from condrl.io.records import from_json
from condrl.prompts import Row
from condrl.rewards import server as server_module
from condrl.rewards.client import Client
from condrl.rewards.scoring import Reward, make_reward
from condrl.rewards.server import Queue, Server
from condrl.rewards.wire import pack, unpack

ROW = Row(0, "a red star")


def first(samples, prompts):
    return samples[:, 0]


@contextmanager
def serving(call=first, token=None, **constants):
    """A server within this process, with some constants of its module set; yields its port, and the server."""
    before = {name: getattr(server_module, name) for name in constants}
    vars(server_module).update(constants)
    server = Server(("127.0.0.1", 0), Reward("test", 1.0, call), token, torch.device("cpu"))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield server.server_port, server
    finally:
        server.shutdown()
        server.server_close()
        vars(server_module).update(before)


def exchange(port, *parts, pause=0.0):
    """The status and the content of what a server answers to these bytes; None where it hangs up without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        for part in parts:
            time.sleep(pause)
            line.sendall(part)
        heard = b"".join(iter(lambda: line.recv(2**16), b""))
    if not heard:
        return None
    head, _, content = heard.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


def head(size, **changes):
    """The head of a request with a body of so many bytes."""
    given = {"Host": "127.0.0.1:1", "Content-Type": "application/json", "Content-Length": str(size)}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join(["POST / HTTP/1.1", *lines, "", ""]).encode("latin-1")


BODY = pack(torch.full((1, 2), 0.5), [ROW])


def test_a_request_that_is_one_is_answered():
    with serving() as (port, _):
        assert exchange(port, head(len(BODY)) + BODY) == (200, b'{"scores": [0.5]}')
        assert exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") == (200, b'{"reward": "test"}')


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Host": "evil.example"}, 403),  # a name that was made to lead here
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": None}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a page may send without asking first
        ({"Content_Type": None}, 415),
        ({"Content_Length": "\u00b2"}, 413),
        ({"Content_Length": "9" * 5000}, 413),
        ({"Content_Length": "-1"}, 413),
        ({"Content_Length": "1e3"}, 413),
        ({"Content_Length": None}, 413),
        ({"Content_Length": None, "Transfer_Encoding": "chunked"}, 413),
        ({"X": "y" * 70_000}, 431),
    ],
)
def test_a_head_that_is_not_right_is_answered(changes, status):
    with serving() as (port, _):
        found, content = exchange(port, head(0, **changes))
        assert found == status
        assert "error" in json.loads(content)
        assert exchange(port, head(len(BODY)) + BODY)[0] == 200  # and goes on


def test_without_the_token_nothing_is_read_and_nothing_said():
    with serving(token="secret") as (port, server):
        for changes in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": "Bearer \u00fc"}):
            status, content = exchange(port, head(2**26, **changes))  # the body is not waited for
            assert (status, server.queue.count) == (401, 0)
        assert json.loads(content) == {"error": "the token is missing or wrong"}
        status, content = exchange(port, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (status, b"test" in content) == (401, False)
        right = head(len(BODY), Host="gpu7:8200", Authorization="Bearer secret")
        assert exchange(port, right + BODY)[0] == 200


def test_who_is_refused_hears_why_while_still_sending():
    with serving(token="secret") as (port, _):
        client = Client(f"http://127.0.0.1:{port}", "rewards.remote.url", None, 20.0, 0, 0.0, 1)
        assert client.ask([b"x" * 2**24], [bytes]) == [None]
    assert client.errors[0].endswith("answered 401: the token is missing or wrong")


@pytest.mark.slow
def test_a_client_that_drips_is_hung_up_on():
    with serving(SECONDS=0.5) as (port, server):
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"reset|Broken pipe|abort"):
            exchange(port, b"POST / HTTP/1.1\r\n", *[b"X: y\r\n"] * 100, pause=0.1)
        assert time.monotonic() - begun < 3
        with pytest.raises(OSError, match=r"reset|Broken pipe|abort"):
            exchange(port, head(1000), *[b"x"] * 100, pause=0.1)
        assert exchange(port, head(1000)) is None
        settled(server)


def settled(server):
    """Wait until a server holds nothing any more."""
    deadline = time.monotonic() + 10
    while (server.queue.count or server.queue.bytes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (server.queue.count, server.queue.bytes) == (0, 0)


@pytest.mark.slow
def test_who_has_gone_is_not_scored_for():
    """Sixteen at once, a fifth of a second each, with a patience of one: all are scored in the end, hardly one twice."""
    scored = []

    def slow(samples, prompts):
        time.sleep(0.2)
        scored.append(prompts[0])
        return samples[:, 0]

    with serving(slow) as (port, server):
        options = {
            "url": f"http://127.0.0.1:{port}",
            "per_request": 1,
            "concurrent": 16,
            "timeout": 1.0,
            "backoff": 0.25,
        }
        rows = [Row(i, f"prompt {i}") for i in range(16)]
        found = make_reward("remote", {**options, "retries": 5})(torch.arange(32.0).view(16, 2), rows)
        settled(server)
    assert found.tolist() == list(range(0, 32, 2))
    assert {*scored} == {row.prompt for row in rows}
    assert len(scored) <= 22


def test_a_client_that_leaves_while_it_is_scored_for_is_no_news(capsys):
    came, leave = threading.Event(), threading.Event()

    def awaited(samples, prompts):
        came.set()
        leave.wait(10)
        return samples[:, 0]

    with serving(awaited) as (port, server):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head(len(BODY)) + BODY)
            came.wait(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        leave.set()
        settled(server)
        assert exchange(port, head(len(BODY)) + BODY)[0] == 200
    assert not capsys.readouterr().err


def test_a_hundred_at_once_are_all_answered():
    with serving(MOST_WAITING=10) as (port, server), ThreadPoolExecutor(100) as pool:
        gate = threading.Barrier(100)

        def one(_):
            gate.wait()
            return exchange(port, head(len(BODY)) + BODY)[0]

        found = list(pool.map(one, range(100)))
        settled(server)
    assert {*found} <= {200, 503}
    assert found.count(200) >= 10


def test_more_connections_than_there_may_be_are_told_to_come_again():
    with serving(MOST_CONNECTIONS=2) as (port, _):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as third:
            heard = third.recv(1000)
        for line in silent:
            line.close()
        assert heard.startswith(b"HTTP/1.0 503 ")
        assert b"Retry-After: 1" in heard
        deadline = time.monotonic() + 10
        while exchange(port, head(len(BODY)) + BODY)[0] == 503 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert exchange(port, head(len(BODY)) + BODY)[0] == 200


def test_a_full_queue_says_when_to_come_again():
    release = threading.Event()

    def held(samples, prompts):
        release.wait(20)
        return samples[:, 0]

    with serving(held, MOST_WAITING=2) as (port, server), ThreadPoolExecutor(2) as pool:
        server.queue.took(8.0)
        waiting = [pool.submit(exchange, port, head(len(BODY)) + BODY) for _ in range(2)]
        while server.queue.count < 2:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(head(len(BODY)) + BODY)
            heard = line.recv(1000)
        release.set()
        assert [w.result()[0] for w in waiting] == [200, 200]
    assert heard.startswith(b"HTTP/1.0 503 ")
    assert b"Retry-After: 8\r\n" in heard


def test_bodies_are_held_up_to_a_bound_together():
    queue = Queue()
    assert [queue.enter(2**28), queue.enter(2**28), queue.enter(1)] == [True, True, False]
    queue.leave(2**28)
    assert queue.enter(1)


def test_an_image_with_too_many_pixels_is_not_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (8192, 4096)).save(file, "PNG")
    assert len(file.getvalue()) < 10_000
    body = {"kind": "png", "samples": [base64.b64encode(file.getvalue()).decode()], "rows": [{"prompt": ""}]}
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="33554432 pixels are too many for one request"):
        unpack(json.dumps(body).encode())


def test_large_images_are_sent_in_smaller_requests(monkeypatch):
    monkeypatch.setattr("condrl.plugins.rewards.remote.MOST_PIXELS", 2 * 8 * 8)
    sizes = []

    def counted(samples, prompts):
        sizes.append(len(samples))
        return samples.flatten(1).mean(1)

    with serving(counted) as (port, _):
        reward = make_reward("remote", {"url": f"http://127.0.0.1:{port}", "concurrent": 1})
        assert reward(torch.ones(5, 3, 8, 8), [ROW] * 5).tolist() == [1.0] * 5
    assert sizes == [2, 2, 1]


def test_what_is_no_number_is_null():
    def odd(samples, prompts):
        return torch.tensor([float("inf"), float("nan"), 1.0])

    body = pack(torch.zeros(3, 2), [ROW] * 3)
    with serving(odd) as (port, _):
        assert exchange(port, head(len(body)) + body) == (200, b'{"scores": [null, null, 1.0]}')


def test_a_thread_that_cannot_start_takes_no_connection_away(monkeypatch):
    with serving(MOST_CONNECTIONS=1) as (port, _):
        start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        with suppress(OSError):
            exchange(port, head(len(BODY)) + BODY)
        monkeypatch.setattr(threading.Thread, "start", start)
        assert exchange(port, head(len(BODY)) + BODY)[0] == 200


WRONG = (
    {"samples": [[True, 1]]},
    {"samples": [["1", 1]]},
    {"samples": [[1e39, 1]]},
    {"samples": [1.0]},
    {"samples": [[1], [1, 2]], "rows": [{"prompt": ""}] * 2},
    {"rows": [{"prompt": None}]},
    {"rows": [{"prompt": 5}]},
    {"rows": ["ab"]},
    {"rows": [{"prompt": "a", "metadata": ["ab", "cd"]}]},
    {"kind": "jpg"},
    {"samples": 3},
    {"rows": {}},
)


@pytest.mark.parametrize("change", WRONG)
def test_nothing_of_a_request_is_guessed(change):
    body = json.dumps({"kind": "points", "samples": [[1, 2]], "rows": [{"prompt": "a"}], **change}).encode()
    with serving() as (port, _):
        assert exchange(port, head(len(body)) + body)[0] == 400


def test_a_key_that_comes_twice_among_many_takes_no_time():
    with pytest.raises(ValueError, match="the key '99999' is duplicated"):
        from_json("{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}')


@pytest.mark.slow
def test_ctrl_c_ends_a_server_whose_reward_hangs(tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import time, condrl\n@condrl.reward(differentiable=False)\ndef hangs(samples, prompts): time.sleep(1000)\n"
    )
    command = [
        sys.executable,
        str(ROOT / "scripts" / "reward_server.py"),
        "hangs",
        "--plugin",
        "hangs.py",
        "--port",
        "0",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, cwd=tmp_path, **pipes)
    port = int(server.stdout.readline().rpartition(":")[2])
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    for line in waiting:
        line.sendall(head(len(BODY)) + BODY)
    time.sleep(1)
    server.send_signal(signal.SIGINT)
    said = server.communicate(timeout=60)[1]
    assert (server.returncode, said.strip()) == (130, "interrupted")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_protocol_is_as_documented(tmp_path):
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    command = page[page.index("    printf") : page.index("## A judge")]
    Image.new("RGB", (512, 512), "white").save(tmp_path / "image.png")
    with serving(lambda samples, prompts: samples.flatten(1).mean(1)) as (port, _):
        words = ["bash", "-c", command.replace("8200", str(port))]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout) == {"scores": [1.0]}
