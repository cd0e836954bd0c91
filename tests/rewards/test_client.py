"""Rewards over HTTP, against real servers on this machine: right, slow, broken and killed ones."""

import base64
import email.utils
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, answering, run_python, toy_words

from condrl import UsageError
from condrl.commands import serve
from condrl.prompts import Row
from condrl.rewards.client import Client, retry_after_seconds
from condrl.rewards.scoring import make_reward
from condrl.rewards.testing import check_reward, smooth_images
from condrl.rewards.wire import pack, unpack

SERVER = str(ROOT / "scripts" / "reward_server.py")
PLUGIN = """
import time
import torch
import condrl


@condrl.reward(differentiable=False)
def slow(samples, prompts, *, seconds: float = 0.0, after: int = 0):
    slow.calls = getattr(slow, "calls", 0) + 1
    time.sleep(seconds if slow.calls > after else 0)
    return samples[:, 0].flatten(1).mean(1) if samples.dim() == 4 else samples[:, 0]


@condrl.reward(differentiable=False)
def by_row(samples, prompts, metadata):
    return torch.tensor([float(row["k"]) + len(prompt) for row, prompt in zip(metadata, prompts)])


@condrl.reward(differentiable=False)
def stumbling(samples, prompts):
    stumbling.calls = getattr(stumbling, "calls", 0) + 1
    if stumbling.calls == 1:
        raise ConnectionError("upstream reset")
    return samples[:, 0]


@condrl.reward(differentiable=False)
def partly(samples, prompts):
    return torch.tensor([float("nan") if "bad" in prompt else 1.0 for prompt in prompts])
"""
JSON = {"Content-Type": "application/json"}
QUICK = {"retries": 1, "backoff": 0.01}


@contextmanager
def served(folder, *words, **env):
    """A reward server of its own process; yields its address and the process."""
    (folder / "mine.py").write_text(PLUGIN)
    command = [sys.executable, SERVER, *words, "--plugin", str(folder / "mine.py"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process.stdout.readline().split()[-1], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def rows(count, prompt="a red star"):
    return [Row(i, prompt + "!" * i, {"k": i}) for i in range(count)]


def test_scores_are_those_of_the_reward_here(tmp_path):
    x = (smooth_images(10) * 255).round() / 255
    with served(tmp_path, "brightness") as (url, _):
        far = make_reward("remote", {"url": url, "per_request": 3, "concurrent": 3})(x, rows(10))
        check_reward("remote", url=url)
    torch.testing.assert_close(far, make_reward("brightness", {})(x, rows(10)))


@pytest.mark.slow
def test_prompts_metadata_points_and_options_arrive(tmp_path):
    with served(tmp_path, "by_row") as (url, _):
        found = make_reward("remote", {"url": url, "per_request": 2})(torch.randn(5, 2), rows(5))
    assert found.tolist() == [10.0, 12.0, 14.0, 16.0, 18.0]
    x = torch.randn(6, 2)
    with served(tmp_path, "box", "low=[-1,-1]", "high=[1,1]") as (url, _):
        found = make_reward("remote", {"url": url})(x, rows(6))
    assert torch.equal(found, (x.abs() <= 1).all(1).float())


@pytest.mark.slow
def test_a_score_that_failed_there_is_missing_here(tmp_path):
    with served(tmp_path, "partly") as (url, _):
        given = [Row(0, "good"), Row(1, "bad"), Row(2, "good")]
        found = make_reward("remote", {"url": url})(torch.zeros(3, 2), given)
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.slow
def test_a_slow_server_is_waited_for_until_the_timeout(tmp_path):
    with served(tmp_path, "slow", "seconds=5") as (url, _):
        reward = make_reward("remote", {"url": url, "timeout": 0.3, **QUICK})
        begun = time.monotonic()
        found = reward(torch.zeros(2, 2), rows(2))
        assert time.monotonic() - begun < 4
    assert found.isnan().all()
    assert reward.failure(found, rows(2)).endswith(f"{url} did not answer: no complete answer within 0.3 s")


def test_a_server_that_was_killed(tmp_path):
    with served(tmp_path, "slow") as (url, process):
        reward = make_reward("remote", {"url": url, **QUICK})
        assert reward(torch.ones(2, 2), rows(2)).tolist() == [1.0, 1.0]
        process.kill()
        process.wait()
        found = reward(torch.ones(2, 2), rows(2))
    assert found.isnan().all()
    assert "Connection refused" in reward.failure(found, rows(2))


@pytest.mark.slow
def test_an_error_of_the_reward_itself_is_tried_again(tmp_path):
    with served(tmp_path, "stumbling") as (url, _):
        assert make_reward("remote", {"url": url, **QUICK})(torch.ones(1, 2), rows(1)).tolist() == [1.0]


@pytest.mark.slow
def test_no_proxy_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with served(tmp_path, "slow") as (url, _):
        assert make_reward("remote", {"url": url, **QUICK})(torch.ones(1, 2), rows(1)).tolist() == [1.0]


def test_a_server_that_comes_back_is_asked_again(tmp_path):
    with answering(b'{"error": "busy"}', 503) as (url, asked):
        reward = make_reward("remote", {"url": url, "retries": 2, "backoff": 0.01})
        assert reward(torch.zeros(1, 2), rows(1)).isnan().all()
        assert len(asked) == 3
        assert f"{url} answered 503: busy" in reward.failure(torch.tensor([float("nan")]), rows(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"hello",
        b"[]",
        b"{}",
        b'{"scores": [1]}',
        b'{"scores": [1, "x"]}',
        b'{"scores": ["0.7", "0.8"]}',
        b'{"scores": [true, false]}',
        b'{"scores": [1, Infinity]}',
        b'{"scores": [1, 1e999]}',
        b"[" * 200_000,
        b'{"scores": [1, [2]]}',
        b'{"scores": [1, 1%s]}' % (b"0" * 400),
        b"\xff\xfe",
        b"",
    ],
)
def test_garbage_is_no_score(body):
    with answering(body) as (url, _):
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.zeros(2, 2), rows(2))
    assert found.isnan().all()
    assert "sent an invalid answer" in reward.failure(found, rows(2))


@contextmanager
def talking(*parts, pause=0.0):
    """A server that answers each connection with these parts of bytes, one after the other; yields address and times."""
    server, asked = socket.create_server(("127.0.0.1", 0)), []

    def talk(connection):
        with connection, suppress(OSError):
            request = connection.makefile("rb")
            lengths = [
                line.split()[1] for line in iter(request.readline, b"\r\n") if line.startswith(b"Content-Length")
            ]
            request.read(int(lengths[0]))  # what is not read would reset the connection
            for part in parts:
                time.sleep(pause)
                connection.sendall(part)

    def listen():
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                asked.append(time.monotonic())
                threading.Thread(target=talk, args=[connection], daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


GOOD = b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps({"scores": [0.5]}).encode()


@pytest.mark.parametrize("start", [b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n", b""])
def test_a_server_that_drips_is_given_up_at_the_deadline(start):
    with talking(start, *[b" "] * 100, pause=0.1) as (url, _):
        reward = make_reward("remote", {"url": url, "timeout": 0.5, "retries": 0})
        begun = time.monotonic()
        found = reward(torch.zeros(1, 2), rows(1))
        assert time.monotonic() - begun < 1.5
    assert reward.failure(found, rows(1)).endswith("did not answer: no complete answer within 0.5 s")


def test_a_slow_answer_within_the_deadline_counts():
    with talking(*[GOOD[i : i + 1] for i in range(len(GOOD))], pause=0.01) as (url, _):
        assert make_reward("remote", {"url": url, "timeout": 10.0})(torch.zeros(1, 2), rows(1)).tolist() == [0.5]


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n", b"\xff", b"HTTP/1.1 200 OK\r\nA: \xff\r\n"],
)
def test_an_answer_that_is_no_http_is_a_failed_score(answer):
    with talking(answer) as (url, asked):
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.zeros(1, 2), rows(1))
    assert found.isnan().all()
    assert len(asked) == 2


def test_pauses_grow_up_to_a_bound(monkeypatch):
    client, waited = Client("http://127.0.0.1:9", "rewards.remote.url", None, 1.0, 2000, 1.0, 1), []
    monkeypatch.setattr(client, "ended", SimpleNamespace(wait=waited.append, clear=lambda: None, set=lambda: None))
    monkeypatch.setattr(client, "_post", lambda body: (_ for _ in ()).throw(OSError("no")))
    assert client.ask([b""], [bytes]) == [None]
    assert waited[:5] == [0, 1, 2, 4, 8]
    assert {*waited[-1000:]} == {300}


def test_an_error_that_is_cut_off_is_tried_again():
    with talking(b"HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nabc") as (url, asked):
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.zeros(1, 2), rows(1))
    assert len(asked) == 2
    assert "answered 500: Internal Server Error" in reward.failure(found, rows(1))


def test_a_server_that_asks_for_a_pause_gets_it():
    busy = b"HTTP/1.0 503 Busy\r\nRetry-After: %s\r\n\r\n"
    with talking(busy % b"1") as (url, asked):
        make_reward("remote", {"url": url, **QUICK})(torch.zeros(1, 2), rows(1))
        assert asked[1] - asked[0] >= 1
    with talking(busy % b"3600") as (url, asked):  # the request fails; the server is not asked again too early
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.zeros(1, 2), rows(1))
        assert len(asked) == 1
    assert "answered 503: Service Unavailable (and asks to wait 3600 s)" in reward.failure(found, rows(1))


def test_the_pause_that_a_server_asks_for_is_seconds_or_a_date():
    assert retry_after_seconds("7") == 7
    assert 50 < retry_after_seconds(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [
        retry_after_seconds(text) for text in (None, "", "soon", "-1", "9" * 40, "Mon, 01 Jan 1990 00:00:00 GMT")
    ] == [0] * 6


def test_nobody_is_followed_elsewhere():
    with talking(GOOD) as (elsewhere, asked):
        with talking(f"HTTP/1.0 307 Go\r\nLocation: {elsewhere}/\r\n\r\n".encode()) as (url, _):
            reward = make_reward("remote", {"url": url, **QUICK})
            found = reward(torch.zeros(1, 2), rows(1))
        assert not asked
    assert "answered 307: Temporary Redirect" in reward.failure(found, rows(1))


def test_an_answer_without_end_is_not_kept(monkeypatch):
    monkeypatch.setattr("condrl.rewards.client.MOST_BYTES", 1000)
    with talking(GOOD, b" " * 2000) as (url, _):
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.zeros(1, 2), rows(1))
    assert "did not answer: its answer is longer than 1000 bytes" in reward.failure(found, rows(1))


def test_what_a_server_says_cannot_steer_the_terminal():
    with answering(b'{"error": "\\u001b[2Jgone\\r\\nerror: fake"}', 400) as (url, _):
        reward = make_reward("remote", {"url": url, **QUICK})
        said = reward.failure(reward(torch.zeros(1, 2), rows(1)), rows(1))
    assert said.endswith("answered 400:  [2Jgone  error: fake")


def test_nobody_waits_for_a_server_after_ctrl_c():
    """The first request's reader is interrupted, the second one's server is silent."""

    def read(body):
        while not asked:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with talking(GOOD) as (url, _), talking(pause=60) as (silent, asked):
        client = Client(url, "rewards.remote.url", None, 60.0, 3, 60.0, 2)
        other = Client(silent, "rewards.remote.url", None, 60.0, 3, 60.0, 2)
        client._post = lambda body, own=client._post: other._post(body) if body == b"silent" else own(body)
        client.open, client.ended = other.open, other.ended
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.ask([b"good", b"silent"], [read, read])
        while any("PoolExecutor" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() - begun < 10
            time.sleep(0.01)


SECRET = "sk-123secret"


@pytest.mark.parametrize("value", [f"{SECRET}\rX: y", f"{SECRET}\x1b[2J", f"{SECRET} 2", "ключ" + SECRET, " "])
def test_a_secret_that_cannot_be_sent_is_not_shown(value, monkeypatch):
    monkeypatch.setenv("CONDRL_REWARD_TOKEN", value)
    with pytest.raises(UsageError, match="the environment variable CONDRL_REWARD_TOKEN ") as raised:
        make_reward("remote", {"url": "http://127.0.0.1:1"})
    assert SECRET not in str(raised.value)


def test_a_secret_that_a_server_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("CONDRL_REWARD_TOKEN", SECRET)
    with answering(json.dumps({"error": "x" * 290 + f"not authorised: Bearer {SECRET}"}).encode(), 401) as (url, _):
        reward = make_reward("remote", {"url": url, **QUICK})
        said = reward.failure(reward(torch.zeros(1, 2), rows(1)), rows(1))
    assert SECRET[:5] not in said


def test_where_a_secret_goes_is_said_once(monkeypatch, capsys):
    monkeypatch.setenv("CONDRL_REWARD_TOKEN", SECRET)
    for _ in range(2):
        make_reward("remote", {"url": "http://rewards.example:8200"})
    line = "rewards.remote sends what is in CONDRL_REWARD_TOKEN to rewards.example:8200, not encrypted\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8200",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://h:x",
        "http://[::1",
        "http://h/a b",
        "http://h/\x1b",
        "http://h/?key=1",
        "http://h/#a",
        "file:///etc/passwd",
        "",
    ],
)
def test_an_invalid_address_is_one_line(url):
    with pytest.raises(
        UsageError, match="^config rewards.remote.url: expected an address like http://127.0.0.1:8200, without"
    ):
        make_reward("remote", {"url": url})


def test_a_password_in_an_address_is_neither_taken_nor_shown():
    with pytest.raises(UsageError, match="config rewards.remote.url: expected an address") as raised:
        make_reward("remote", {"url": f"http://me:{SECRET}@127.0.0.1:8200"})
    assert SECRET not in str(raised.value)


@pytest.mark.slow
def test_a_token_is_asked_for(tmp_path, monkeypatch):
    with served(tmp_path, "slow", CONDRL_REWARD_TOKEN="secret") as (url, _):
        reward = make_reward("remote", {"url": url, **QUICK})
        found = reward(torch.ones(1, 2), rows(1))
        assert found.isnan().all()
        assert f"{url} answered 401: the token is missing or wrong" in reward.failure(found, rows(1))
        monkeypatch.setenv("CONDRL_REWARD_TOKEN", " secret\r\n")  # as `set` of Windows and an editor leave it
        assert make_reward("remote", {"url": url, **QUICK})(torch.ones(1, 2), rows(1)).tolist() == [1.0]


UNREADABLE = (
    b"not json",
    b"{}",
    json.dumps({"kind": "png", "samples": ["AAAA"], "rows": [{"prompt": "x"}]}).encode(),
    json.dumps({"kind": "png", "samples": [], "rows": []}).encode(),
    json.dumps({"kind": "points", "samples": [[1.0]], "rows": []}).encode(),
)


@pytest.mark.slow
def test_the_server_refuses_what_it_cannot_read(tmp_path):
    with served(tmp_path, "slow") as (url, _):
        for body in UNREADABLE:
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(urllib.request.Request(url, body, JSON), timeout=20)
            assert raised.value.code == 400
        huge = urllib.request.Request(url, b"x", {"Content-Length": str(10**12), **JSON})
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(huge, timeout=20)
        assert raised.value.code == 413
        assert make_reward("remote", {"url": url})(torch.ones(1, 2), rows(1)).tolist() == [1.0]  # and still serves


def test_images_travel_without_loss():
    x = (torch.rand(2, 3, 9, 7) * 255).round() / 255
    found, given = unpack(pack(x, rows(2)))
    assert torch.equal(found, x)
    assert given == rows(2)
    bomb = {"kind": "png", "samples": [base64.b64encode(b"GIF89a").decode()], "rows": [{"prompt": ""}]}
    with pytest.raises((ValueError, OSError)):
        unpack(json.dumps(bomb).encode())


@pytest.mark.slow
def test_what_cannot_be_is_one_line(tmp_path, capsys, monkeypatch):
    server = serve
    with pytest.raises(UsageError, match="expected an address like"):
        make_reward("remote", {"url": "127.0.0.1:8200"})
    (tmp_path / "w.pt").write_bytes(b"")
    taken = socket.create_server(("127.0.0.1", 0))
    clip = ["clip", "model=ViT-B-32", f"weights={tmp_path / 'w.pt'}"]
    with taken:
        for words, said in (
            (["nothing"], "error: unknown reward 'nothing'"),
            (["brigthness"], "Did you mean 'brightness'?"),
            (["brightness", "--host", "0.0.0.0"], "error: --host 0.0.0.0 lets others in"),
            (["brightness", "--port", str(taken.getsockname()[1])], "Address already in use"),
            (
                ["brightness", "--port", "99999"],
                "error: cannot listen on 127.0.0.1:99999: bind(): port must be 0-65535",
            ),
            (["brightness", "--device", "foo"], "error: --device foo cannot be used: "),
            (["brightness", "--device", "meta"], "error: --device meta cannot be used: "),
            (["brightness", "--device", "cuda:99"], "error: --device cuda:99 cannot be used: "),
            (
                ["brightness", "quality"],
                "error: 'quality' is not an option of the reward: options are written key=value",
            ),
            (["brightness", "--plugin", "nowhere.py"], "error: plugins: there is no file nowhere.py"),
            (["box", "lwo=[1]"], "error: config box.lwo: there is no such key"),
            (["box", "low=[1"], "low=[1': while parsing"),
            (["box", "weight=1"], "error: config box.weight: there is no such key"),
            (["similarity"], "error: config similarity: similarity needs images"),
            (clip, f"error: config rewards.clip.weights: {tmp_path / 'w.pt'} is empty"),
        ):
            monkeypatch.setattr(sys, "argv", [SERVER, *words])
            assert server.main(words) == 2
            printed = capsys.readouterr()
            assert said in printed.err
            assert printed.err.count("\n") == 1
            assert not printed.out
    done = run_python(SERVER, "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown reward 'nothing'")
    assert done.stderr.count("\n") == 1


def test_a_reward_of_whole_groups_is_not_served(tmp_path, capsys):
    """A request has some images of several prompts."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import condrl\n\n\n@condrl.reward(per='group')\ndef served_by_group(samples, prompts):\n"
        "    return samples.mean((1, 2, 3)) - samples.mean()\n"
    )
    assert serve.main(["served_by_group", "--plugin", str(plugin), "--port", "0"]) == 2
    assert "the reward 'served_by_group' compares the images of a prompt" in capsys.readouterr().err


def test_what_is_no_png_is_named():
    content = base64.b64encode(b"no picture").decode()
    whole = json.dumps({"kind": "png", "samples": [content], "rows": [{"prompt": "a"}]}).encode()
    with pytest.raises(ValueError, match="sample 0 is not a PNG file"):
        unpack(whole)


def test_a_host_that_nobody_knows(capsys, monkeypatch):
    monkeypatch.setenv("CONDRL_REWARD_TOKEN", "x")
    monkeypatch.setattr(sys, "argv", [SERVER, "brightness", "--host", "nowhere.invalid"])
    assert serve.main(sys.argv[1:]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot listen on nowhere.invalid:8200: ")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_reward_that_raises_there_says_so_here(tmp_path):
    with served(tmp_path, "by_row") as (url, _):
        reward = make_reward("remote", {"url": url, "retries": 0})
        given = [Row(4, "a cat", {"l": 1})]
        found = reward(torch.zeros(1, 2), given)
    assert "answered 500: RewardError: the reward 'by_row' needs 'k' in each prompt's metadata" in reward.failure(
        found, given
    )


@pytest.mark.slow
def test_a_run_whose_server_dies_stops_and_says_why(tmp_path):
    """The server scores some epochs; then it is gone."""
    more = ["rewards.quadratic.weight=0", "rewards.remote.weight=1", "rewards.remote.retries=0", "prompts.heldout=null"]
    with served(tmp_path, "slow", "seconds=0.3", "after=8") as (url, process):
        command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *toy_words("nft", tmp_path / "run"), *more]
        command += [f"rewards.remote.url={url}", "train.epochs=1000"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        record = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not record.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert "stopped: the reward 'remote' failed for the prompt" in said
    assert "100% of the scores failed" in said


@pytest.mark.slow
def test_a_quick_run_whose_server_falls_silent_stops_with_a_checkpoint(tmp_path):
    """Its epochs took milliseconds, so their end would have been waited for."""
    silent = threading.Event()

    def answer(body):
        count = len(json.loads(body)["rows"])
        if (tmp_path / "run" / "metrics.jsonl").exists():
            silent.set()
            time.sleep(60)
        return json.dumps({"scores": [float(i) for i in range(count)]}).encode()

    more = ["rewards.quadratic.weight=0", "rewards.remote.weight=1", "prompts.heldout=null", "train.epochs=1000"]
    with answering(answer) as (url, _):
        command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *toy_words("nft", tmp_path / "run"), *more]
        run = subprocess.Popen([*command, f"rewards.remote.url={url}"], stderr=subprocess.PIPE, text=True)
        assert silent.wait(60)
        time.sleep(0.5)
        asked = time.monotonic()
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=30)[1]
        assert time.monotonic() - asked < 10
    assert run.returncode == 130, said
    assert list((tmp_path / "run" / "checkpoints").glob("epoch_*"))
