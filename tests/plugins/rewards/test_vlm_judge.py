"""A judge behind an OpenAI-compatible server, against real servers on this machine that answer well, badly or never."""

import base64
import io
import json
import math
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import answering
from PIL import Image

from condrl import UsageError
from condrl.prompts import Row
from condrl.rewards.pixels import from_pil
from condrl.rewards.scoring import make_reward
from condrl.rewards.testing import check_reward, smooth_images

QUICK = {"retries": 1, "backoff": 0.01, "timeout": 5.0, "model": "judge"}


@contextmanager
def judging(answer, status=200):
    """The API's address of a server that answers `answer(request)`, and the requests that it had."""

    def reply(body):
        content = answer(json.loads(body))
        return content if isinstance(content, bytes) else json.dumps(content).encode()

    with answering(reply, status) as (url, requests):
        yield f"{url}/v1", requests


def seen(request):
    """The image (3, H, W) and the text of a request."""
    image, text = request["messages"][0]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return from_pil(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


def brightness_as_yes(request):
    """P(yes) is the brightness, spread over two spellings; .1 goes to other words."""
    yes = seen(request)[0].mean().item()
    chances = {"Yes": 0.6 * yes * 0.9, " yes": 0.4 * yes * 0.9, "No": (1 - yes) * 0.9, "Maybe": 0.1}
    top = [{"token": token, "logprob": math.log(max(p, 1e-12))} for token, p in chances.items()]
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def saying(text):
    return lambda _: {"choices": [{"message": {"content": text}}]}


def rows(count, prompt="a red star"):
    return [Row(i, prompt) for i in range(count)]


def test_yes_is_its_share_of_yes_and_no(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # for others: it is sent where `key` says so
    x = (smooth_images(5) * 255).round() / 255
    with judging(brightness_as_yes) as (url, requests):
        found = make_reward("vlm_judge", {"url": url, **QUICK})(x, rows(5))
    torch.testing.assert_close(found, x.flatten(1).mean(1), atol=1e-5, rtol=1e-5)
    path, headers, body = requests[0].path, requests[0].headers, json.loads(requests[0].body)
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["logprobs"], body["max_tokens"]) == ("judge", 0, True, 1)
    assert seen(body)[1] == 'Does this image show "a red star"? Answer yes or no.'


def test_it_keeps_the_rules_of_rewards():
    with judging(brightness_as_yes) as (url, _):
        check_reward("vlm_judge", value_range=(0, 1), url=url, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7),
        ("Score: 7.5.", 7.5),
        ("8/10", 8),
        ("I give it 3 out of 10", 3),
        ("0", 0),
        ("11", None),
        ("-1", None),
        ("between 6 and 7", None),
        ("seven", None),
        ("", None),
        (None, None),
        (["7"], None),
    ],
)
def test_a_number_is_read_or_the_score_has_failed(text, score):
    with judging(saying(text)) as (url, _):
        reward = make_reward("vlm_judge", {"url": url, "answer": "number", **QUICK})
        found = reward(smooth_images(1), rows(1))
    if score is None:
        assert found.isnan().all()
        assert "sent an invalid answer" in reward.failure(found, rows(1))
    else:
        assert found.tolist() == [score]


def test_a_choice_without_a_message_has_failed():
    with judging(lambda _: {"choices": ["7"]}) as (url, _):
        assert make_reward("vlm_judge", {"url": url, "answer": "number", **QUICK})(smooth_images(1), rows(1)).isnan()


def test_a_number_that_may_be_truncated_has_failed():
    cut = {"choices": [{"message": {"content": "I would rate it as a 1"}, "finish_reason": "length"}]}
    with judging(lambda _: cut) as (url, _):
        assert make_reward("vlm_judge", {"url": url, "answer": "number", **QUICK})(smooth_images(1), rows(1)).isnan()


def test_the_question_is_the_users():
    options = {"answer": "number", "low": 1.0, "high": 5.0, "question": "{prompt}? {low}-{high}"}
    with judging(saying("5")) as (url, requests):
        make_reward("vlm_judge", {"url": url, **options, **QUICK})(smooth_images(1), rows(1, "a {high} cat"))
    assert seen(json.loads(requests[0].body))[1] == "a {high} cat? 1-5"


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        b"hello",
        {},
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": None, "logprob": 0.0}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": None}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Maybe", "logprob": -0.1}]}]}}]},
    ],
)
def test_what_does_not_say_yes_or_no_has_failed(answer):
    with judging(lambda _: answer) as (url, _):
        reward = make_reward("vlm_judge", {"url": url, **QUICK})
        found = reward(smooth_images(2), rows(2))
    assert found.isnan().all()
    assert reward.failure(found, rows(2)).startswith("the reward 'vlm_judge' failed for the prompt 'a red star': http")


def test_a_server_that_is_slow_gone_or_refuses():
    with judging(lambda _: time.sleep(1) or {}) as (url, _):
        reward = make_reward("vlm_judge", {"url": url, **QUICK, "timeout": 0.1})
        assert "did not answer" in reward.failure(reward(smooth_images(1), rows(1)), rows(1))
    gone = make_reward("vlm_judge", {"url": url, **QUICK})
    assert "did not answer" in gone.failure(gone(smooth_images(1), rows(1)), rows(1))
    with judging(lambda _: {"error": {"message": "no such model"}}, status=404) as (url, requests):
        reward = make_reward("vlm_judge", {"url": url, **QUICK})
        assert "answered 404: no such model" in reward.failure(reward(smooth_images(1), rows(1)), rows(1))
        assert len(requests) == 1  # what will not change is not asked again


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with judging(brightness_as_yes) as (url, requests):
        make_reward("vlm_judge", {"url": url, "key": "JUDGE_KEY", **QUICK})(smooth_images(1), rows(1))
    assert requests[0].headers["Authorization"] == "Bearer secret"


def test_an_image_that_comes_again_is_not_judged_again():
    x = smooth_images(3)
    with judging(brightness_as_yes) as (url, requests):
        options = {"url": url, **QUICK}
        first = make_reward("vlm_judge", options)(x, rows(3))
        assert len(requests) == 3
        again = make_reward("vlm_judge", options)  # another of the same, as a measure of the run is
        assert torch.equal(again(x[[2, 0, 2]], rows(3)), first[[2, 0, 2]])
        assert len(requests) == 3
        again(x, rows(3, "a blue star"))
        assert len(requests) == 6
        make_reward("vlm_judge", {**options, "question": "Is it {prompt}?"})(x, rows(3))
        assert len(requests) == 9


def test_a_failed_score_is_asked_for_again():
    answers = iter([b"hello", b"hello", None])
    with judging(lambda request: next(answers) or brightness_as_yes(request)) as (url, _):
        reward = make_reward("vlm_judge", {"url": url, **QUICK})
        assert reward(smooth_images(1), rows(1)).isnan().all()
        assert reward(smooth_images(1), rows(1)).isfinite().all()


def test_what_cannot_be_is_one_line():
    with pytest.raises(UsageError, match="expected an address like"):
        make_reward("vlm_judge", {"url": "localhost:8000", "model": "x"})
    with pytest.raises(UsageError, match="10 is not below high, 5"):
        make_reward("vlm_judge", {"url": "http://localhost", "model": "x", "low": 10.0, "high": 5.0})
