"""The page of a run, from folders made by hand: what it says, what it shows, and what it needs."""

import base64
import io
import json
import math
import re
import shutil
import statistics
import subprocess
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml
from PIL import Image

from condrl.commands import report
from condrl.commands.result import present
from condrl.io.records import write_json
from condrl.prompts import Row
from condrl.report.card import write_card
from condrl.report.charts import WIDTH, Chart, Mark, Scale, Series, apart, number, padded, smoothed
from condrl.report.comparison import against_kl, frontier
from condrl.report.page import OPENING, page
from condrl.report.pictures import embedded, gain, pair_kinds
from condrl.report.run import read_run, verdict, with_distinct_names
from condrl.report.usage import diffusers_code
from condrl.training.evaluate import Estimate, Evaluation, compared
from condrl.training.folder import MANIFEST, RunFolder
from condrl.training.heldout import most_changed, save_film, save_heldout

CONFIG = {
    "model": {"name": "stable_diffusion", "path": "asset:shapes", "guidance": 2.0},
    "sampler": {"name": "ddim", "steps": 10, "spacing": "trailing", "eta": 1.0},
    "evaluate": {"sampler": {"steps": 20}},
    "algorithm": {"name": "nft"},
    "rewards": {"bright": {"weight": 2.0}, "off": {"weight": 0.0}},
}


def row(base, tuned, low, high):
    estimates = {
        who: {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]} for who, mean in (("base", base), ("tuned", tuned))
    }
    return estimates | {"difference": {"mean": tuned - base, "ci95": [low, high]}, "win_rate": 0.75}


BETTER, WORSE, SAME = row(0.5, 0.7, 0.1, 0.3), row(0.5, 0.4, -0.2, -0.05), row(0.5, 0.52, -0.1, 0.14)


def make_run(folder, heldout=None, lines=(), images=(), config=CONFIG):
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("config.yaml\nmetrics.jsonl\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in images))
    if heldout is not None:
        before = {"heldout/bright": 0.5, "heldout/bright_ci95": 0.1}
        result = {"heldout": heldout, "before": before, "seconds": 12.0, "images": 64, "versions": {"torch": "2"}}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def an_epoch(epoch, diagnosis=(), **more):
    found = {"epoch": epoch, "images": 8 * epoch, "updates": epoch, "reward/total": 0.1 * epoch, "grad_norm": 1.0}
    return found | {"reward/bright": 0.05 * epoch, "diagnosis": list(diagnosis)} | more


# ---------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("heldout", "diagnosis", "word"),
    [
        ({"bright": BETTER}, [], "better"),
        ({"bright": BETTER, "other": SAME}, [], "better"),
        ({"bright": SAME}, [], "not shown"),
        ({}, [], "not shown"),
        ({"bright": WORSE}, [], "worse"),
        ({"other": WORSE}, [], "worse"),
        ({"bright": BETTER, "other": WORSE}, [], "hacked"),
        ({"bright": BETTER}, ["reward_hacking"], "hacked"),
        ({"bright": WORSE, "other": BETTER}, [], "mixed"),
        ({"bright": BETTER}, ["collapse"], "collapsed"),
        ({"bright": WORSE}, ["reward_fell"], "collapsed"),
        ({"bright": WORSE, "other": BETTER}, ["heldout_fell"], "collapsed"),
        ({"bright": SAME}, ["reward_fell"], "collapsed"),
        ({"bright": BETTER}, ["reward_fell"], "better"),
        ({"bright": BETTER, "other": WORSE}, ["heldout_fell"], "hacked"),
        (None, [], "unfinished"),
    ],
)
def test_the_verdict(heldout, diagnosis, word, tmp_path):
    """By the paired intervals, and by what is still wrong at the end."""
    run = read_run(make_run(tmp_path / "run", heldout, [an_epoch(1), an_epoch(2, diagnosis)]))
    found = verdict(run, run.findings())
    assert found.word == word
    if heldout and word == "better":
        assert "bright: 0.500 to 0.700, +0.200 [+0.100, +0.300]." in found.sentence
        assert "other" not in found.sentence
    if word == "collapsed":
        assert "epoch 2 " in found.sentence


def test_a_reward_with_a_negative_weight_is_better_lower(tmp_path):
    config = CONFIG | {"rewards": {"bright": {"weight": -1.0}}}
    for name, heldout, word, tone, wins in (("a", WORSE, "better", "up", "25%"), ("b", BETTER, "worse", "down", "25%")):
        run = read_run(make_run(tmp_path / name, {"bright": heldout}, [an_epoch(1)], config=config))
        assert verdict(run, []).word == word
        assert f'<td class="{tone}">' in page([run])
        assert f"<td>{wins}</td><td>yes, lower</td>" in page([run])


def test_a_diagnosis_that_passed_is_told_and_does_not_decide(tmp_path):
    """With the sentence of the epoch in which it came, and that it did not last."""
    lines = [an_epoch(1, diversity=1.0), an_epoch(2, ["collapse"], diversity=0.05), an_epoch(3, diversity=1.0)]
    run = read_run(make_run(tmp_path / "run", {"bright": BETTER}, lines))
    (finding,) = run.findings()
    assert (finding.name, finding.epoch, finding.lasting) == ("collapse", 2, False)
    assert finding.text.startswith("the images of a prompt differ 5% as much as at the start")
    assert verdict(run, [finding]).word == "better"
    assert "epoch 2, no longer at the end: the images of a prompt" in page([run])


def test_a_collapsed_run_tells_losses_and_gains(tmp_path):
    for name, diagnosis in (("a", "collapse"), ("b", "heldout_fell")):
        heldout = {"bright": WORSE, "other": BETTER, "third": SAME}
        run = read_run(make_run(tmp_path / name, heldout, [an_epoch(1, [diagnosis])]))
        found = verdict(run, run.findings())
        assert found.word == "collapsed"
        assert found.sentence.endswith("bright: 0.500 to 0.400, -0.100 [-0.200, -0.050]. " + OTHER_BETTER)


OTHER_BETTER = "other: 0.500 to 0.700, +0.200 [+0.100, +0.300]."


def record_base(folder, measures=(("heldout/bright", 0.5), ("heldout/bright_ci95", 0.01)), model="asset:shapes"):
    write_json(folder / "base.json", {"model": model, "measures": dict(measures)})
    return folder


def add_to_result(folder, **more):
    write_json(folder / "result.json", json.loads((folder / "result.json").read_text()) | more)
    return folder


def test_an_unfinished_run_says_what_is_wrong_so_far(tmp_path):
    """With the sentences that need the base's measures, and without what has passed."""
    lines = [
        an_epoch(1, ["collapse"], **{"reward/total_std": 0.01}),
        an_epoch(2, ["reward_hacking"], **{"heldout/bright": 0.3, "heldout/bright_ci95": 0.01}),
    ]
    run = read_run(record_base(make_run(tmp_path / "run", None, lines)))
    assert run.before == {"heldout/bright": 0.5, "heldout/bright_ci95": 0.01}
    sentence = verdict(run, run.findings()).sentence
    assert "Wrong so far: reward hacking (first in epoch 2)." in sentence
    assert "collapse" not in sentence
    assert "held-out measures got worse (heldout/bright from 0.5 to 0.3)" in page([run])
    assert '<div class="verdict bad"' in page([run])


def test_a_measure_that_failed_in_an_epoch_is_not_drawn_there(tmp_path):
    """A number that was not finite is null in the records."""
    lines = [an_epoch(1, **{"heldout/bright": 0.6, "heldout/bright_ci95": 0.1}), an_epoch(2, ["reward_hacking"])]
    lines[1] |= {"heldout/bright": None, "heldout/bright_ci95": None, "reward/total_std": 0.1}
    run = read_run(record_base(make_run(tmp_path / "run", None, lines), {"heldout/bright": None}))
    assert run.before == {}
    assert "Held-out bright: tuned from 0.6 at epoch 1 to 0.6 at 1" in page([run])


def test_the_path_kl_and_the_diversity_are_told_where_they_were_measured(tmp_path):
    folder = a_whole_run(tmp_path / "run")
    run = read_run(folder)
    write_card(run, folder / "lora", run.result["heldout"], run.images)
    for text in (page([run]), (folder / "lora" / "README.md").read_text()):
        assert "diversity within a prompt" not in text
        assert "The path KL" not in text
    run = read_run(add_to_result(folder, path_kl=6.0625, diversity=row(0.3, 0.2, -0.15, -0.05)))
    write_card(run, folder / "lora", run.result["heldout"], run.images)
    assert verdict(run, []).sentence.endswith(" The path KL to the base is 6.062 nats.")
    assert tables(page([run]))[0][-1][:4] == [
        "diversity within a prompt",
        "0.300",
        "0.200",
        "-0.100 [-0.150,\xa0-0.050]",
    ]
    card = (folder / "lora" / "README.md").read_text()
    assert "| diversity within a prompt | 0.300 to 0.200, -0.100 [-0.150, -0.050] |" in card
    assert "The path KL to the base is 6.062 nats." in card
    write_card(run, folder / "lora", {"bright": WORSE})  # of another LoRA than the last, of which only this is known
    card = (folder / "lora" / "README.md").read_text()
    assert "path KL" not in card
    assert "diversity" not in card
    assert verdict(read_run(add_to_result(folder, path_kl=None)), []).sentence.endswith("[+0.100, +0.300].")


@pytest.mark.parametrize(
    ("model", "recorded", "told"),
    [
        ({"name": "sd3", "path": None}, None, "sd3"),
        (
            {"name": "sd3", "path": "asset:shapes", "lora": "/a/runs/q1/lora"},
            None,
            "asset:shapes with the LoRA q1/lora",
        ),
        ({"name": "sd3", "path": "x/y", "lora": "/a/style.safetensors"}, None, "x/y with the LoRA style.safetensors"),
        ({"name": "sd3", "path": "x/y"}, "/models/mine with the LoRA a/b", "mine with the LoRA a/b"),
    ],
)
def test_the_base_is_named_without_this_machines_folders(model, recorded, told, tmp_path):
    """By base.json, or else by the config; on the page and in the card."""
    folder = a_whole_run(tmp_path / "run", CONFIG | {"model": model})
    if recorded:
        record_base(folder, model=recorded)
    run = read_run(folder)
    assert f"<p>nft, tuned on bright (weight 2), against {told}</p>" in page([run])
    write_card(run, folder / "lora", {"m": BETTER})
    text = (folder / "lora" / "README.md").read_text()
    assert f"`{told}`, tuned with condrl by nft." in text
    assert f"against `{told}`, both drawn" in text


# ---------------------------------------------------------------------------------------------- charts


def test_labels_of_marks_are_not_written_over_each_other():
    assert apart([(100.0, "3"), (10.0, "1"), (20.0, "2"), (35.0, "4, 5"), (55.5, "6")]) == [
        (35.0, ["1", "2", "4, 5"]),
        (55.5, ["6"]),
        (100.0, ["3"]),
    ]


def test_a_charts_places_are_its_numbers():
    scale = Scale(0.0, 10.0, 100.0, 300.0)
    assert [scale(x) for x in (0, 5, 10)] == [100, 200, 300]
    assert scale.ticks() == [0, 2, 4, 6, 8, 10]
    assert Scale(1, 3, 0, 1).ticks() == [1, 1.5, 2, 2.5, 3]
    assert Scale(1, 3, 0, 1).ticks(least=1.0) == [1, 2, 3]
    assert Scale(0.0113, 0.0129, 0, 1).ticks() == pytest.approx([0.0115, 0.012, 0.0125])
    assert padded(2.0, 2.0, 0.1) == (1.8, 2.2)
    assert padded(0.0, 10.0, 0.1) == (-1.0, 11.0)
    assert [number(x) for x in (0, 0.5, 1234.5, 123456.0, 1e-5, -2.0)] == [
        "0",
        "0.5",
        "1234",
        "1.23e+05",
        "1.00e-05",
        "-2",
    ]


def test_a_chart_says_in_words_what_it_shows():
    chart = Chart(
        "Reward", [Series("a<b", [(1, 0.5), (3, 0.75)], [0.1, 0.1]), Series("none", [])], marks=[Mark(2, "7, 8")]
    )
    html = chart.html()
    assert 'aria-label="Reward: a&lt;b from 0.5 at epoch 1 to 0.75 at 3"' in html
    assert html.count("<polyline") == html.count("<polygon") == 1
    assert ">7, 8</text>" in html
    assert "a<b" not in html
    assert Chart("Nothing", [Series("none", [])]).html() == ""


def test_many_points_have_a_line_of_their_mean():
    """Which leaves straight lines as they are, but for their ends, and halves nothing but the noise."""
    line = [(float(i), 2.0 * i + 1) for i in range(60)]
    for (x, y), expected in zip(smoothed(line), line[3:-3], strict=True):
        assert (x, y) == (expected[0], pytest.approx(expected[1]))
    noisy = [(x, y + (-1) ** i) for i, (x, y) in enumerate(line)]
    assert max(abs(y - z) for (_, y), (_, z) in zip(smoothed(noisy), line[3:-3], strict=True)) < 0.2
    assert Chart("Reward", [Series("a", noisy)]).html().count("<polyline") == 2
    assert Chart("Reward", [Series("a", noisy[:30])]).html().count("<polyline") == 1


def texts(html, kind):
    """The place, the anchor and the text of each text of a class."""
    pattern = rf'<text class="{kind}[^"]*" x="([^"]*)" y="[^"]*" text-anchor="([^"]*)">(.*?)</text>'
    return [(float(x), anchor, text) for x, anchor, text in re.findall(pattern, html)]


def test_labels_of_marks_are_not_cut_at_the_right_edge():
    html = Chart("Reward", [Series("a", [(1, 0.5), (9, 0.75)])], marks=[Mark(2, "1"), Mark(9, "2, 3")]).html()
    (left, start, _), (right, end, _) = texts(html, "marked")
    assert (start, end) == ("start", "end")
    assert left < right < WIDTH


def test_a_measures_chart_has_the_bases_line_and_a_title_to_read(tmp_path):
    folder = record_base(a_whole_run(tmp_path / "run"), {"heldout/bright": 0.25, "validation/bright": 0.5})
    html = page([read_run(folder)])
    assert 'aria-label="Validation bright: tuned from 0.5 at epoch 0 to 0.54 at 4; base 0.5"' in html
    assert html.count('<polyline class="line base"') == html.count("</svg>base: 0.5</li>") == 1
    assert "validation/bright" not in html
    record_base(folder, {})
    add_to_result(folder, before={})
    assert 'class="line base"' not in (html := page([read_run(folder)]))
    assert 'aria-label="Validation bright: tuned from 0.52 at epoch 2 to 0.54 at 4"' in html


def test_a_share_s_band_stays_within_0_and_1():
    """Where the base does, too; other measures have bands as wide as they are."""
    band = Series("a", [(1, 0.05), (2, 0.9)], [0.2, 0.2])
    assert [low_high[1:] for low_high in band.band((0, 1))] == [(0, 0.25), (pytest.approx(0.7), 1)]
    places = {}
    for base in (0.5, 1.5):
        html = Chart("Share", [band], base=base).html()
        ys = [float(pair.split(",")[1]) for pair in re.search('<polygon[^>]*points="([^"]*)"', html)[1].split()]
        ticks = {
            float(text): float(y) for y, text in re.findall(r'y="([^"]*)" text-anchor="end">([^<]*)</text>', html)[:-1]
        }
        zero = ticks[0] - 5 if 0 in ticks else None
        places[base] = max(ys) - zero
    assert places[0.5] == pytest.approx(0, abs=0.2)
    assert places[1.5] > 5


def test_the_gain_over_the_base_is_drawn_with_its_paired_interval(tmp_path):
    """From 0 at epoch 0; the interval may lie below 0."""
    folder = a_whole_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1::2]:
        line |= {"gain/bright": 0.01 * line["epoch"], "gain/bright_ci95": 0.05}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = page([read_run(folder)])
    label = "Gain over the base, from the same noise: bright from 0 at epoch 0 to 0.04 at 4; base 0"
    chart = next(svg for svg in re.findall("<svg viewBox.*?</svg>", html) if label in svg)
    lower = [float(pair.split(",")[1]) for pair in re.search('<polygon[^>]*points="([^"]*)"', chart)[1].split()][3:]
    zero = float(re.search('<polyline class="line base" points="[^,]*,([^ ]*) ', chart)[1])
    assert lower[-1] == pytest.approx(zero, abs=0.2)  # of the base itself
    assert min(lower[:2]) > zero + 2
    assert label not in page([read_run(a_whole_run(tmp_path / "other"))])


def test_all_charts_of_a_run_have_the_same_epochs(tmp_path):
    """From 0 to the last, wherever their points are."""
    html = page([read_run(a_whole_run(tmp_path / "run"))])
    across = [
        re.findall(r'text-anchor="middle">([^<]*)<', chart) for chart in re.findall("<svg viewBox.*?</svg>", html)
    ]
    assert len([ticks for ticks in across if ticks]) > 3
    assert all(ticks == ["0", "1", "2", "3", "4", "5"] for ticks in across if ticks)


def test_more_series_than_colours_are_told_apart():
    html = Chart("Reward", [Series(str(i), [(1, 0.5), (9, 0.75)]) for i in range(8)]).html()
    kinds = re.findall('<polyline class="(line [^"]*)"', html)
    assert len(set(kinds)) == 8
    assert [f'<line class="{kind}"' in html for kind in kinds] == [True] * 8  # in the legend


def test_a_series_keeps_its_colour_where_another_has_no_points():
    html = Chart("Reward", [Series("a", []), Series("b", [(1, 0.5)])]).html()
    assert 'class="line c1"' in html
    assert 'class="line c0"' not in html


def test_a_runs_kl_belongs_to_the_evaluation_before(tmp_path):
    """It was measured before that epoch's updates."""
    lines = [an_epoch(1, base_kl=0.0, **{"heldout/bright": 0.6}), an_epoch(2, base_kl=5.0, **{"heldout/bright": 0.7})]
    run = read_run(make_run(tmp_path / "run", {"bright": BETTER}, lines))
    assert against_kl(run, "heldout/bright") == [(0, 0.0, 0.5), (1, 5.0, 0.6)]


def test_where_few_epochs_are_measured_a_kl_belongs_to_its_own_epoch(tmp_path):
    """One epoch's updates lie between them; the base model is where there is no KL."""
    lines = [an_epoch(e) for e in range(1, 11)]
    for epoch, kl, value in ((5, 18.4, 0.6), (10, 27.7, 0.7)):
        lines[epoch - 1] |= {"base_kl": kl, "heldout/bright": value}
    run = read_run(make_run(tmp_path / "run", {"bright": BETTER}, lines))
    assert against_kl(run, "heldout/bright") == [(0, 0.0, 0.5), (5, 18.4, 0.6), (10, 27.7, 0.7)]


# ---------------------------------------------------------------------------------------------- pages


class Reader(HTMLParser):
    """What a page refers to, its tags in balance, and its text."""

    def __init__(self, html):
        super().__init__()
        self.references, self.open, self.text, self.alts = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.references += [found[name] for name in ("src", "href", "srcset", "data") if name in found]
        if tag == "img":
            self.alts.append(found["alt"])
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SECTIONS = [
    "What went wrong",
    "Held-out prompts, base and tuned from the same noise",
    "Its course",
    "Base | tuned",
    "One seed over the run",
    "Use it",
    "What it took",
]


def plain(html):
    return unescape(re.sub("<[^>]*>", "", html))


def tables(html):
    """The texts of each table's cells, row by row."""
    return [
        [
            [plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall("<tr>.*?</tr>", table)
        ]
        for table in re.findall("<table>.*?</table>", html)
    ]


def headings(html):
    found = {
        f"h{level}": [plain(text) for text in re.findall(f"<h{level}>(.*?)</h{level}>", html)] for level in range(1, 5)
    }
    return {level: texts for level, texts in found.items() if texts}


def captions(html):
    """The texts beside each pair of pictures."""
    return [plain(text) for text in re.findall('<div class="pair">.*?</div>(.*?)</div>', html)]


def an_image(number, base, tuned, pictures=True):
    files = {who: f"heldout/{number:05d}_{who}.png" for who in ("base", "tuned")}
    line = {"prompt": f"a <b>{number}</b> star", "row": number, "metadata": {}, "seed": number}
    return line | {"base": {"bright": base}, "tuned": {"bright": tuned}, "pictures": files if pictures else None}


def a_whole_run(folder, config=CONFIG):
    lines = [an_epoch(e, ["gradient_growth"] if e > 3 else [], base_kl=2.0 * e, diversity=1.0) for e in range(1, 6)]
    for line in lines[1::2]:
        line |= {"validation/bright": 0.5 + 0.01 * line["epoch"], "validation/bright_ci95": 0.02}
    images = [an_image(0, 0.9, 0.1), an_image(1, 0.2, 0.8), an_image(2, 0.5, 0.5), an_image(3, 0.1, 0.9, False)]
    run = make_run(folder, {"bright": BETTER, "other": SAME}, lines, images, config)
    for i in range(3):
        for who, size in (("base", (64, 64)), ("tuned", (600, 300))):
            path = run / "heldout" / f"{i:05d}_{who}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", size, (10 * i, 0, 0)).save(path)
    for name in ("film", "evaluations"):
        (run / name).mkdir()
    for epoch in (0, 2, 4):
        line = {"prompt": "a <b>0</b> star", "row": 0, "seed": 0, "measures": {"bright": 0.1 * epoch}}
        (run / "evaluations" / f"epoch_{epoch:05d}.jsonl").write_text(json.dumps(line) + "\n")
        Image.new("RGB", (64, 64)).save(run / "film" / f"epoch_{epoch:05d}_0.png")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return run


def test_a_page_is_whole_in_itself(tmp_path):
    """Pictures lie in it, nothing is fetched, no script runs, texts are escaped, and it is small."""
    html = page([read_run(a_whole_run(tmp_path / "my <run>"))])
    reader = Reader(html)
    assert html.startswith(OPENING)
    assert reader.open == []
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert all(reference.startswith("data:image/") for reference in reader.references)
    assert len(reader.references) == 6 + 3
    assert "a <b>0</b> star" in reader.text
    assert "<b>0" not in html
    assert all(reader.alts)
    assert len(html) < 3e6


def test_a_page_shows_the_worst_first(tmp_path):
    run = read_run(a_whole_run(tmp_path / "run"))
    text = Reader(page([run])).text
    places = [
        text.index(part)
        for part in ("Worst regressions", "a <b>0</b>", "Best gains", "a <b>1</b>", "Others", "a <b>2</b>")
    ]
    assert places == sorted(places)
    assert "a <b>3</b>" not in text  # nobody drew it
    spread = statistics.pstdev([0.9, 0.2, 0.5, 0.1])
    assert gain(run, run.images[0]) == pytest.approx(-0.8 / spread)
    assert "epoch 4: the gradient" in text or "epoch 4: gradient growth" in text


def test_a_measure_that_failed_on_every_image_is_on_the_page_and_the_card(tmp_path):
    """As `compared` has it of scores that are all NaN, and a result file of that."""
    failed = an_evaluation({"bright": [math.nan] * 4})
    rows = compared(failed, failed)
    folder = a_whole_run(tmp_path / "run")
    write_json(folder / "result.json", {**json.loads((folder / "result.json").read_text()), "heldout": rows})
    run = read_run(folder)
    assert "not measured" in page([run])
    write_card(run, folder / "lora", run.result["heldout"], run.images)
    assert "| bright | not measured |" in (folder / "lora" / "README.md").read_text()


def test_a_card_is_written_where_pictures_were_deleted(tmp_path):
    folder = a_whole_run(tmp_path / "run")
    (folder / "heldout" / "00001_tuned.png").unlink()
    run = read_run(folder)
    write_card(run, folder / "lora", {"m": BETTER}, run.images)
    text = (folder / "lora" / "README.md").read_text()
    assert "images/1.png" in text
    assert "images/2.png" not in text
    assert "a <b>1</b> star" not in text


def test_a_gain_is_in_all_measures_and_a_reversed_reward_is_better_lower(tmp_path):
    """Each in its own unit: what was not tuned on counts as much."""
    images = [an_image(0, 0.0, 0.1), an_image(1, 0.2, 0.2)]
    for line, (base, tuned) in zip(images, ((0.0, -300.0), (200.0, None)), strict=True):
        line["base"]["other"], line["tuned"]["other"] = base, tuned
    run = read_run(make_run(tmp_path / "run", images=images))
    assert gain(run, run.images[0]) == pytest.approx(0.1 / 0.1 - 300 / 100)
    assert gain(run, run.images[1]) == 0  # a score that failed says nothing
    config = CONFIG | {"rewards": {"other": {"weight": -1.0}}}
    run = read_run(make_run(tmp_path / "reversed", images=images, config=config))
    assert gain(run, run.images[0]) == pytest.approx(0.1 / 0.1 + 300 / 100)


def test_a_page_says_how_to_use_the_lora_with_the_runs_own_sampler(tmp_path):
    text = Reader(page([read_run(a_whole_run(tmp_path / "run"))])).text
    code = text[text.index("import torch") : text.index(".images[0]")]
    assert "num_inference_steps=20," in code  # evaluate.sampler's
    assert "guidance_scale=2.0," in code
    assert "eta=1.0," in code
    assert 'timestep_spacing="trailing"' in code
    compile(code + ".images[0]", "snippet", "exec")


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (
            {"name": "stable_diffusion", "guidance": 3.0, "negative_prompt": "grey", "height": 24, "width": 16},
            ["StableDiffusionPipeline", "guidance_scale=3.0,", "negative_prompt='grey',", "height=24,", "width=16,"],
        ),
        (
            {"name": "sd3", "t5": False, "t5_tokens": 9},
            ["text_encoder_3=None, tokenizer_3=None)", "sequence_length=9,"],
        ),
        ({"name": "flux", "guidance": 1.0}, ["guidance_scale=3.5,", "true_cfg_scale=1.0,", "negative_prompt='',"]),
        ({"name": "sys:exit", "path": "x/y"}, ["DiffusionPipeline"]),  # not imported for a page
    ],
)
def test_the_code_tells_diffusers_what_the_model_was_told(model, shown, tmp_path):
    run = read_run(make_run(tmp_path / "run", config=CONFIG | {"model": model}))
    code = diffusers_code(run, "a/model", "a/lora")
    assert all(part in code for part in shown), code
    compile(code, "snippet", "exec")


def test_the_code_loads_a_model_of_one_file_as_one(tmp_path):
    """With its configs where the run had them, and without this machine's folders, on the page and in the card."""
    model = {"name": "stable_diffusion", "path": "/models/mine.safetensors", "single_file_config": "/models/configs"}
    run = read_run(a_whole_run(tmp_path / "run", CONFIG | {"model": model}))
    write_card(run, run.folder / "lora", {}, [])
    for text in (unescape(page([run])), (run.folder / "lora" / "README.md").read_text()):
        code = 'from_single_file("path/to/mine.safetensors", torch_dtype=torch.float32, config="path/to/configs")'
        assert code in text
    assert ".from_pretrained(" in diffusers_code(run, "merged", None)


def test_several_runs_are_compared(tmp_path):
    runs = [read_run(a_whole_run(tmp_path / name)) for name in ("one", "two")]
    html = page(runs)
    assert Reader(html).open == []
    assert "2 runs" in html
    assert "path KL to the base model, nats" in html
    table = tables(html)[0]
    assert table[0] == ["run", "algorithm", "verdict", "bright, difference", "other, difference",
                        "network calls", "seconds", "images"]  # fmt: skip
    expected = ["nft", "better", "+0.200 [+0.100,\xa0+0.300]", "+0.020 [-0.100,\xa0+0.140]", "", "12", "64"]
    assert table[1:] == [["one", *expected], ["two", *expected]]
    assert headings(html) == {
        "h1": ["2 runs"],
        "h2": ["Comparison", "The same prompts", "Measures by path KL", "one", "two"],
        "h3": [*SECTIONS, *SECTIONS],
        "h4": ["Worst regressions", "Best gains", "Others, in the prompts' order"] * 2,
    }
    assert headings(page(runs[:1]))["h2"] == SECTIONS
    for i, name in ((1, "one"), (2, "two")):
        assert f'<a href="#run-{i}">{name}</a>' in html
        assert re.search(rf'id="run-{i}"><h2>{name}</h2>', html)


def test_runs_on_one_page_have_different_names(tmp_path):
    """With as many of the folders above as they need."""
    places = [tmp_path / place for place in ("a/x/run", "b/x/run", "b/y/run", "other")]
    runs = [read_run(make_run(place)) for place in places]
    assert [run.name for run in with_distinct_names(runs)] == ["a/x/run", "b/x/run", "y/run", "other"]
    assert [run.name for run in with_distinct_names(runs[:1])] == ["run"]
    assert ">y/run</a>" in page(runs)


def test_runs_that_do_not_compare_are_warned_of(tmp_path):
    same = {"lines": [an_epoch(1)], "images": [an_image(0, 0.1, 0.2)], "heldout": {"bright": SAME}}
    one, two = (read_run(make_run(tmp_path / name, **same)) for name in ("one", "two"))
    going = read_run(make_run(tmp_path / "going", None, [an_epoch(1)]))
    other_prompts = read_run(make_run(tmp_path / "prompts", **(same | {"images": [an_image(1, 0.1, 0.2)]})))
    other_base = read_run(
        record_base(make_run(tmp_path / "base", **same), model="asset:shapes with the LoRA /x/q1/lora")
    )
    config = CONFIG | {"evaluate": {"sampler": {"steps": 30}}}
    other_sampler = read_run(make_run(tmp_path / "sampler", **same, config=config))
    assert "do not compare" not in page([one, two, going])
    for run, reason in (
        (other_prompts, "held-out prompts"),
        (other_base, "base models (asset:shapes; asset:shapes with the LoRA q1/lora)"),
        (other_sampler, "samplers of held-out prompts"),
    ):
        assert f"The runs have different {reason}: their numbers do not compare." in page([one, run, going])


def test_the_same_prompts_are_side_by_side(tmp_path):
    """The base once for runs of one base, then each run; only what all drew, from the same noise."""
    runs = [a_whole_run(tmp_path / name) for name in ("one", "two")]
    (lines := json.loads(f"[{(runs[1] / 'heldout.jsonl').read_text().strip().replace(chr(10), ',')}]"))[1]["seed"] = 99
    (runs[1] / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    going = read_run(make_run(tmp_path / "going", None, [an_epoch(1)]))
    shown = sides(page([*map(read_run, runs), going]))
    assert shown == [
        (f"a <b>{i}</b> star, seed {i}", [f"{who}: a <b>{i}</b> star" for who in ("base", "one", "two")])
        for i in (0, 2)
    ]
    many = [an_image(i, 0.1, 0.2) for i in range(12)]
    more = [read_run(make_run(tmp_path / name, {}, [an_epoch(1)], many)) for name in ("c", "d")]
    assert [above for above, _ in sides(page(more))] == [f"a <b>{i}</b> star, seed {i}" for i in range(8)]
    record_base(runs[1], model="another")
    assert sides(page([*map(read_run, runs)]))[0][1] == [
        f"{who}: a <b>0</b> star" for who in ("base of one", "base of two", "one", "two")
    ]


def sides(html):
    """What is above each row of pictures, and their texts."""
    found = re.findall(r'<p>([^<]*)</p><div class="side">(.*?)</div>', html)
    return [
        (unescape(above), [unescape(alt) for alt in re.findall('alt="([^"]*)"', images)]) for above, images in found
    ]


def test_measures_by_path_kl_say_their_epochs(tmp_path):
    """In the epochs' order, whatever the KL; a run without any KL is named below."""
    lines = [an_epoch(e, base_kl=kl, **{"heldout/bright": 0.1 * e}) for e, kl in ((1, 0.0), (2, 30.0), (3, 10.0))]
    lines.append(an_epoch(4, base_kl=20.0))
    zigzag = read_run(make_run(tmp_path / "zigzag", {"bright": BETTER}, lines))
    without = read_run(make_run(tmp_path / "without", {"bright": BETTER}, [an_epoch(1, **{"heldout/bright": 0.6})]))
    html = frontier([zigzag, without])
    places = texts(html, "at c0")
    assert [text for _, _, text in places] == ["0", "1", "2", "3"]
    assert places[2][0] < places[3][0] < places[1][0]
    assert "Not in the charts, for want of a path KL: without." in html
    assert ">without" not in html
    assert "for want of" not in frontier([zigzag])


def test_few_points_have_labels():
    points = [(float(i), i % 2) for i in range(40)]
    html = Chart("Frontier", [Series("a", points, labels=[str(i) for i in range(40)])]).html()
    named = [text for _, _, text in texts(html, "at c0")]
    assert len(named) == 6
    assert (named[0], named[-1]) == ("0", "39")
    assert html.count("<circle") == 40  # joined as they are: a mean over epochs would say nothing
    again = Chart("Frontier", [Series("a", [(1, 1), (9, 2)], labels="12"), Series("b", [(1, 1), (5, 1)], labels="34")])
    assert [text for _, _, text in texts(again.html(), "at c")] == ["1", "2", "4"]  # "3" would be over "1"


@pytest.mark.slow
def test_a_page_of_several_runs_is_small_enough_to_be_mailed(tmp_path):
    """Also of large pictures, with as much detail as photographs have."""
    photograph = Image.effect_noise((32, 32), 60).resize((512, 512)).convert("RGB")
    photograph = Image.blend(photograph, Image.effect_noise((512, 512), 40).convert("RGB"), 0.2)
    runs = []
    for name in "abcd":
        lines = [an_image(i, 0.5, 0.5 + 0.1 * (i % 3 - 1)) for i in range(24)]
        runs.append(make_run(tmp_path / name, {"bright": BETTER}, [an_epoch(1)], lines))
        (runs[-1] / "heldout").mkdir()
        (runs[-1] / "film").mkdir()
        photograph.save(first := runs[-1] / "heldout" / "00000_base.png")
        for line in lines:
            for file in line["pictures"].values():
                if not (runs[-1] / file).exists():
                    (runs[-1] / file).hardlink_to(first)
        for epoch in range(12):
            for i in range(4):
                (runs[-1] / "film" / f"epoch_{epoch:05d}_{i}.png").hardlink_to(first)
    for count in (1, 2, 4):
        assert len(page([read_run(run) for run in runs[:count]])) < 3e6


def test_what_it_took_has_the_hardware_and_the_command(tmp_path):
    """The command as others can use it, the revision as git shortens it."""
    words = ["/home/me/condrl/__main__.py", "finetune", "a b", "model.path=/home/me/models/mine", "run.name=x"]
    folder = add_to_result(
        a_whole_run(tmp_path / "run"), hardware="one H100", command=words, revision="0123456789abcdef"
    )
    html = page([read_run(folder)])
    assert dict(row for row in tables(html)[-1])["hardware"] == "one H100"
    assert dict(row for row in tables(html)[-1])["revision"] == "0123456789"
    assert "condrl finetune 'a b' model.path=path/to/mine run.name=x</pre>" in unescape(html)
    assert "/home/me" not in html


@pytest.mark.parametrize(
    ("heldout", "has_best", "said", "used"),
    [
        ({"bright": BETTER}, True, None, "lora"),
        ({"bright": SAME}, False, None, "lora"),
        (
            {"bright": WORSE},
            False,
            "It is worse than its base. Look at the pictures above before you use lora/.",
            "lora",
        ),
        ({"bright": WORSE}, True, "It is worse than its base. Rather use lora_best/", "lora_best"),
        ({"bright": BETTER, "other": WORSE}, True, "at the cost of other measures. Rather use lora_best/", "lora_best"),
    ],
)
def test_a_lora_that_is_not_better_is_not_recommended(heldout, has_best, said, used, tmp_path):
    """The best one is, if there is one; nothing to copy has a folder of this machine."""
    folder = add_to_result(a_whole_run(tmp_path / "run"), heldout=heldout)
    if has_best:
        shutil.copytree(folder / "lora", folder / "lora_best")
    html = page([read_run(folder)])
    text = plain(re.search("<h2>Use it</h2>(.*?)</section>", html, re.DOTALL)[1])
    assert text.startswith("condrl:") if said is None else said in text
    assert f"condrl sample path/to/run{'' if used == 'lora' else '/lora_best'} --prompt" in text
    assert f'load_lora_weights("path/to/run/{used}"' in text
    assert f"copy {used}/comfyui_lora.safetensors" in text
    assert 'from_pretrained("path/to/shapes"' in text
    assert "asset:shapes comes with condrl: it is condrl/assets/shapes." in text
    assert str(tmp_path) not in html


def test_pictures_say_what_draws_them_again(tmp_path):
    """Pairs their seeds; strips of film the prompt, the epoch and the measures."""
    folder = a_whole_run(tmp_path / "my run")
    html = page([read_run(folder)])
    assert "condrl sample 'path/to/my run' --prompt \"...\" --seeds SEED --compare" in unescape(html)
    assert [re.search(r"seed (\d)$", caption)[1] for caption in captions(html)] == ["0", "1", "2"]
    alts = [alt for alt in Reader(html).alts if "epoch" in alt]
    assert alts == [f"a <b>0</b> star, epoch {epoch}" for epoch in (0, 2, 4)]
    assert '<p>a &lt;b&gt;0&lt;/b&gt; star</p><div class="film"' in html
    assert "<span>epoch 2: bright 0.200</span>" in html
    shutil.rmtree(folder / "evaluations")
    assert "evaluated image 1, epoch 2" in Reader(page([read_run(folder)])).alts


def test_what_scrolls_is_reached_by_keys_and_has_a_name(tmp_path):
    folder = a_whole_run(tmp_path / "run")
    html = page([read_run(add_to_result(folder, command=["condrl", "finetune"]))])
    boxes = re.findall(r'<(?:div class="(?:scroll|film)"|pre)([^>]*)>', html)
    assert len(boxes) == 2 + 1 + 3
    assert all(re.fullmatch(r' tabindex="0" role="region" aria-label="[^"]+"', box) for box in boxes)
    assert re.findall("<th(?! scope=)(?!ead)[^>]*>", html) == []


def test_a_gain_at_the_cost_of_what_was_not_rewarded_says_so(tmp_path):
    images = [an_image(0, 0.1, 0.9), an_image(1, 0.2, 0.9), an_image(2, 0.5, 0.5)]
    for line, (base, tuned) in zip(images, ((1.0, 0.9), (0.5, 0.5), (0.2, None)), strict=True):
        line["base"]["other"], line["tuned"]["other"] = base, tuned
    folder = make_run(tmp_path / "run", {"bright": BETTER}, [an_epoch(1)], images)
    html = page([read_run(folder)])
    costly, gained, same = captions(html)
    assert costly.startswith("a <b>0</b> star" + "bright rose from 0.100 to 0.900; other fell from 1.000 to 0.900")
    assert "Not a plain gain: it came at the cost of other, which was not rewarded." in costly
    assert "bright rose from 0.200 to 0.900; other 0.500, unchanged" in gained
    assert "Not a plain gain" not in gained
    assert "bright 0.500, unchanged; other not measured" in same
    assert '<span class="up">bright rose' in html
    assert '<span class="down">other fell' in html
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"rewards": {"other": {"weight": -1.0}}}))
    assert '<span class="up">other fell' in page([read_run(folder)])


def test_the_losses_of_a_hacked_run_are_those_of_what_was_not_rewarded(tmp_path):
    """However much was gained by what was."""
    images = [an_image(0, 0.5, 0.1), an_image(1, 0.2, 0.9), an_image(2, 0.4, 0.4)]
    for line, tuned in zip(images, (1.0, 0.7, 0.4), strict=True):
        line["base"]["other"], line["tuned"]["other"] = 1.0 - 0.1 * line["row"], tuned
    run = read_run(make_run(tmp_path / "run", {"bright": BETTER, "other": WORSE}, [an_epoch(1)], images))
    assert gain(run, images[1]) > 0 > gain(run, images[0])
    found = {hacked: pair_kinds(run, 8, hacked) for hacked in (False, True)}
    rows = {hacked: [[line["row"] for line in lines] for lines in kinds.values()] for hacked, kinds in found.items()}
    assert rows == {False: [[2, 0], [1], []], True: [[2, 1, 0], [], []]}
    assert headings(page([run]))["h3"] == ["Worst regressions"]


def an_evaluations_entry(steps, strength, **more):
    sampler = {"name": "ddim", "steps": steps, "spacing": None, "eta": 1.0}
    return {"sampler": sampler, "strength": strength, "heldout": {"bright": BETTER}} | more


def record_evaluation(folder, steer, *entries):
    (folder / "evaluation").mkdir()
    result = {"base": "asset:shapes", "steer": steer, "prompts": 9, "images_per_prompt": 2, "evaluations": entries}
    write_json(folder / "evaluation" / "evaluation.json", result)
    return read_run(folder)


def test_later_evaluations_are_on_the_page(tmp_path):
    entries = [
        an_evaluations_entry(10, 1.0, path_kl=5.5, diversity=WORSE),
        an_evaluations_entry(20, 0.5, path_kl=None, diversity=SAME),
    ]
    html = page([record_evaluation(a_whole_run(tmp_path / "run"), None, *entries)])
    assert "9 prompts, 2 images each; tuned beside base; the base is asset:shapes." in html
    assert tables(html)[1] == [
        ["sampler", "steps", "strength", "bright, difference", "diversity, difference", "path KL, nats"],
        ["ddim (eta 1.0)", "10", "1", "+0.200 [+0.100,\xa0+0.300]", "-0.100 [-0.200,\xa0-0.050]", "5.5"],
        ["ddim (eta 1.0)", "20", "0.5", "+0.200 [+0.100,\xa0+0.300]", "+0.020 [-0.100,\xa0+0.140]", ""],
    ]


def test_later_steering_is_on_the_page_with_its_calls(tmp_path):
    steer = {"name": "smc", "particles": 4, "steps": None, "rewards": {"bright": {"weight": 1.0}}}
    entry = an_evaluations_entry(10, None, network_calls={"plain": 10.0, "steered": 42.5})
    html = page([record_evaluation(a_whole_run(tmp_path / "run"), steer, entry)])
    assert "steered by smc, particles=4 (rewards: bright), beside plain" in html
    assert tables(html)[1] == [
        ["sampler", "steps", "strength", "bright, difference", "network calls"],
        ["ddim (eta 1.0)", "10", "base", "+0.200 [+0.100,\xa0+0.300]", "10 plain, 42.5 steered"],
    ]


def test_a_card_has_its_limits_also_where_nothing_was_measured(tmp_path):
    run = read_run(a_whole_run(tmp_path / "run"))
    for heldout, images in (({"m": BETTER}, run.images), ({}, ())):
        write_card(run, run.folder / "lora", heldout, images)
        text = (run.folder / "lora" / "README.md").read_text()
        limits = text[text.index("## Limits") :]
        assert "It was tuned on its rewards alone" in limits
        assert ("Nothing was measured of it" in limits) == (not heldout)
        assert ("The pictures are of the first held-out prompts" in limits) == bool(images)


def test_pictures_are_no_larger_than_needed(tmp_path):
    Image.effect_noise((900, 600), 80).convert("RGB").save(tmp_path / "large.png")
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "small.png")
    for name, size in (("large", (256, 171)), ("small", (64, 64))):
        kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", embedded(tmp_path / f"{name}.png")).groups()
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == size
            assert kind == ("jpeg" if name == "large" else "png")
    whole = (tmp_path / "small.png").read_bytes()
    for size in (0, 20, len(whole) // 2):  # as a process that was killed leaves it
        (tmp_path / "cut.png").write_bytes(whole[:size])
        assert embedded(tmp_path / "cut.png") == ""
    assert embedded(tmp_path / "none.png") == ""


# ---------------------------------------------------------------------------------------------- command


def test_the_command_writes_into_the_runs_folder_and_lists_it(tmp_path, capsys):
    run = a_whole_run(tmp_path / "run")
    for _ in range(2):
        assert report.main([str(run)]) == 0
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    assert "report.html" in RunFolder(run).listed
    assert report.main([str(run), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").read_text().startswith(OPENING)


def test_the_page_of_several_runs_is_written_here(tmp_path, monkeypatch, capsys):
    """Unless something else is there; a run that is named twice is one run."""
    runs = [str(a_whole_run(tmp_path / name)) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert report.main(runs) == 0
    assert "wrote comparison.html" in capsys.readouterr().out
    assert "2 runs" in (tmp_path / "comparison.html").read_text()
    (tmp_path / "comparison.html").write_text("mine")
    assert report.main(runs) == 2
    assert "is not a page that condrl wrote" in capsys.readouterr().err
    assert (tmp_path / "comparison.html").read_text() == "mine"
    assert report.main([runs[0], runs[0]]) == 0
    assert (tmp_path / "one" / "report.html").is_file()


def test_a_run_does_not_fail_for_its_page(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr("condrl.report.page.write_report", full)
    present(RunFolder(a_whole_run(tmp_path / "run")))
    assert "warning: no report: [Errno 28] No space left on device: 'report.html'" in capsys.readouterr().err


def test_a_run_that_goes_on_has_a_page(tmp_path):
    """Also while its last line is being written."""
    run = make_run(tmp_path / "run", None, [an_epoch(1)])
    with (run / "metrics.jsonl").open("a") as record:
        record.write('{"epoch": 2, "ima')
    assert report.main([str(run)]) == 0
    assert "Unfinished" in (text := (run / "report.html").read_text()) or "unfinished" in text
    assert "1 epoch is recorded" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "is not a run's folder: it has no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml is not a run's config"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "cannot read .*config.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl, line 1"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl, line 1: not a record"),
        (lambda run: (run / "result.json").write_text("{}"), "result.json is not a run's result"),
        (lambda run: (run / "result.json").write_text("NaN"), "cannot read .*result.json"),
        (lambda run: (run / "result.json").write_text("[]"), "result.json is not a run's result"),
        (lambda run: (run / "base.json").write_text("{}"), "base.json is not a record of a base model"),
        (lambda run: (run / "report.html").mkdir(), "report.html"),
        (lambda run: (run / "report.html").write_text("mine"), "report.html is in the way, and no run wrote it"),
    ],
)
def test_what_cannot_be_read_or_replaced_is_one_line(spoil, message, tmp_path, capsys):
    run = make_run(tmp_path / "run", {"bright": BETTER}, [an_epoch(1)])
    spoil(run)
    assert report.main([str(run)]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert re.search(message, error)
    assert error.count("\n") == 0


def test_other_files_are_not_replaced(tmp_path, capsys):
    run, mine = make_run(tmp_path / "run", {}, [an_epoch(1)]), tmp_path / "mine.html"
    mine.write_text("<!doctype html> my own")
    assert report.main([str(run), "--out", str(mine)]) == 2
    assert "is not a page that condrl wrote" in capsys.readouterr().err
    assert report.main([str(run), "--out", str(mine / "page.html")]) == 2
    assert "mine.html is a file" in capsys.readouterr().err
    assert mine.read_text() == "<!doctype html> my own"


# ---------------------------------------------------------------------------------------------- what a run keeps


def an_evaluation(values, pictures=()):
    each = {name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()}
    measures = {name: Estimate(v.nanmean().item(), None) for name, v in each.items()}
    return Evaluation(measures, each, each, torch.zeros(1), list(pictures), ["a"] * len(pictures), 0.0)


def test_the_images_that_changed_most_are_kept():
    """In units of each measure's spread; a score that failed changes nothing."""
    base = an_evaluation({"share": [0.0] * 40 + [1.0], "bytes": [1000.0] * 40 + [3000.0]})
    share, size = [0.0] * 40 + [1.0], [1000.0] * 40 + [3000.0]
    share[20], size[30], size[25] = 1.0, -5000.0, float("nan")
    drawn = most_changed(base, an_evaluation({"share": share, "bytes": size}))
    assert {20, 30, *range(8)} <= set(drawn)
    assert len(drawn) <= 24
    assert drawn == sorted(set(drawn))


def test_what_is_a_loss_does_not_depend_on_the_others():
    """An outlier makes the tuned spread large; what did not change has still not lost."""
    base = an_evaluation({"m": [0.0] * 10 + [10.0] * 22 + [1.0] * 8})
    tuned = an_evaluation({"m": [0.0] * 9 + [1000.0] + [10.0] * 22 + [0.5] * 8})
    drawn = most_changed(base, tuned)
    assert {9, *range(32, 40)} <= set(drawn)


def test_a_line_is_kept_for_each_image(tmp_path):
    (tmp_path / "run").mkdir()
    folder, rows = RunFolder(tmp_path / "run"), [Row(5, "a"), Row(7, "b", {"x": 1})]
    base, tuned = an_evaluation({"m": [0.0, 1.0, 2.0, 3.0]}), an_evaluation({"m": [1.0, float("nan"), 2.0, 5.0]})
    save_heldout(folder, rows, 100, base, tuned, [1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()]
    assert [(line["row"], line["prompt"], line["seed"]) for line in lines] == [
        (5, "a", 100), (5, "a", 101), (7, "b", 102), (7, "b", 103),
    ]  # fmt: skip
    assert [line["tuned"]["m"] for line in lines] == [1.0, None, 2.0, 5.0]
    assert [bool(line["pictures"]) for line in lines] == [False, True, False, False]
    assert lines[3]["metadata"] == {"x": 1}


def test_a_film_has_the_first_images_of_each_evaluation(tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    found = an_evaluation({"m": [0.0] * 6}, [torch.full((3, 8, 8), i / 10) for i in range(6)])
    for epoch in (0, 10):
        save_film(folder, epoch, found)
    names = sorted(path.name for path in (tmp_path / "run" / "film").iterdir())
    assert names == [f"epoch_{epoch:05d}_{i}.png" for epoch in (0, 10) for i in range(4)]
    save_film(folder, 20, an_evaluation({"m": [0.0]}, [torch.zeros(2)]))  # points have no pictures
    assert len(list((tmp_path / "run" / "film").iterdir())) == 8


def test_a_card_is_written_anew_with_what_was_measured(tmp_path):
    run = read_run(a_whole_run(tmp_path / "run"))
    claimed = []
    for heldout in ({"m": WORSE}, {"m": BETTER}):
        claimed.clear()
        write_card(run, run.folder / "lora", heldout, run.images, claim=claimed.append)
    text = (run.folder / "lora" / "README.md").read_text()
    assert text.count("## Measured") == 1
    assert "| m | 0.500 to 0.700, +0.200 [+0.100, +0.300] |" in text
    assert "On 4 held-out prompts" in text
    assert "`ddim` (eta 1.0, spacing trailing, steps 20)" in text  # as the config file has them
    assert "num_inference_steps=20," in text
    names = ["images/0.png", "images/1.png", "images/2.png", "README.md"]  # the fourth image was not drawn
    assert claimed == [run.folder / "lora" / name for name in names]
    assert all(path.is_file() for path in claimed)


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize(("width", "count"), [(1280, 1), (390, 1), (390, 3)])
def test_a_browser_draws_the_page_and_fetches_nothing(width, count, tmp_path):
    """In a frame of that width, by a server that sees what else is asked for; the console stays empty.

    Beside the frame it is red if the page is wider than that or a chart's text too small to read, and else green.
    """
    (run, *others), asked = [a_whole_run(tmp_path / ("run" + "_with_a_long_name" * i)) for i in range(count)], []
    (run / "frame.html").write_text(
        f'<body style="margin: 0"><iframe style="width: {width}px; height: 2000px; border: 0" src="report.html"></iframe>'
        "<script>onload = () => { const page = frames[0].document; const small = [...page.querySelectorAll('svg text')]"
        ".some(text => parseFloat(frames[0].getComputedStyle(text).fontSize) * text.getScreenCTM().a < 11);"
        f"const wide = page.documentElement.scrollWidth > {width};"
        "document.body.style.background = wide || small ? 'red' : 'lime' }</script>"
    )
    assert report.main([*map(str, [run, *others]), "--out", str(run / "report.html")]) == 0

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/favicon.ico":  # which the browser asks of every server
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *words):
            pass

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-sync", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", "--v=0", f"--window-size={width + 200},2000", "--hide-scrollbars"]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=run)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        words = ["chromium", *flags, f"--screenshot={tmp_path / 'page.png'}", address]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert set(asked) - {"/favicon.ico"} == {"/frame.html", "/report.html"}
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.convert("RGB").getpixel((width + 100, 1000)) == (0, 255, 0)
        assert len(shot.crop((0, 0, width, 2000)).convert("RGB").getcolors(1 << 24)) > 50
