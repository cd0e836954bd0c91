import codecs
import json
from collections import Counter

import pytest

from condrl import UsageError
from condrl.prompts import Row, _order, duplicate_note, epoch_rows, load_prompts


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \none\n")
    rows = load_prompts(str(tmp_path / "a.txt"), "prompts.train")
    assert rows == [Row(0, "one"), Row(1, "two"), Row(2, "one")]  # the same words twice are two rows
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "target": 3}\n{"prompt": "two"}\n')
    rows = load_prompts(str(tmp_path / "b.jsonl"), "prompts.train")
    assert rows == [Row(0, "one", {"target": 3}), Row(1, "two")]


ENDS_NOTHING = "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"


@pytest.mark.parametrize("character", ENDS_NOTHING)
def test_a_line_ends_at_a_newline_only(tmp_path, character):
    text = f"a red{character}star"
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n{character}\n\t two \n".encode())
    assert load_prompts(str(tmp_path / "a.txt"), "prompts.train") == [Row(0, text), Row(1, "two")]
    line = json.dumps({"prompt": text, "k": character}, ensure_ascii=False)
    if character < " ":
        line = json.dumps({"prompt": text, "k": character})  # JSON has control characters escaped only
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n{line}\n".encode())
    rows = load_prompts(str(tmp_path / "a.jsonl"), "prompts.train")
    assert rows == [Row(i, text, {"k": character}) for i in range(2)]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    assert [row.prompt for row in load_prompts(str(tmp_path / "a.txt"), "prompts.train")] == ["one", "two"]
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"prompt": "one"}\n')
    assert load_prompts(str(tmp_path / "a.jsonl"), "prompts.train") == [Row(0, "one")]


def refused(path):
    """The one line that is said of a prompt file."""
    with pytest.raises(UsageError) as error:
        load_prompts(str(path), "prompts.train")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("config prompts.train: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.txt", " \n\t\r\n", "a.txt is empty"),
        ("a.jsonl", "3\n", 'line 1: expected an object with a "prompt" that is text'),
        ("a.jsonl", '{"prompt": 1}', 'line 1: expected an object with a "prompt" that is text'),
        ("a.jsonl", '\n\n{"text": "a cat"}', 'line 3: expected an object with a "prompt" that is text'),
        ("a.jsonl", "{", "line 1: not usable JSON: Expecting property name"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "k": NaN}',
            "line 2: not usable JSON: NaN is not a JSON number",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "k": [-Infinity]}',
            "line 1: not usable JSON: -Infinity is not a JSON number",
        ),
        ("a.jsonl", '{"prompt": "a", "k": 1e999}', "line 1: not usable JSON: 1e999 is too large"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "line 1: not usable JSON: the key 'prompt' is duplicated",
        ),
        ("a.jsonl", '{"prompt": "a", "k": {"x": 1, "x": 2}}', "the key 'x' is duplicated"),
        ("a.jsonl", '{"prompt": "a", "k": ' + 100_000 * "[", "line 1: not usable JSON"),
        ("a.jsonl", '{"prompt": "a", "k": 1' + 5000 * "0" + "}", "line 1: not usable JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " \\n"}', "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', "line 1: there is a NUL character"),
        ("a.jsonl", '{"prompt": "a \\ud83d"}', "line 1: the prompt has half of a surrogate pair"),
        ("a.txt", "one\ntwo\0three\n", "line 2: there is a NUL character"),
        ("a.txt", "one\rtwo\rthree", "line 1: there is a carriage return"),
        ("a.txt", b"one\ntwo\nth\xe9\n", "line 3: not UTF-8 text"),
        ("a.txt", "one\ntwo\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("a.txt", "one\n".encode("utf-16-be"), "line 1: there is a NUL character"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "is a Git LFS pointer"),
        ("a.csv", "one\n", "a.csv is neither .txt"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(tmp_path / name)
    assert name in refused(tmp_path / name)


def test_what_is_no_file(tmp_path):
    assert refused("").startswith("config prompts.train: give a prompt file, .txt")
    assert "is a folder without better/ and worse/: give a prompt file" in refused(tmp_path)
    assert "there is no prompt file" in refused(tmp_path / "nowhere.txt")
    assert "cannot be read: OSError" in refused("a red star and " * 300)  # a prompt where its file should be
    assert "cannot be read: ValueError" in refused("a\0b")


# ---------------------------------------------------------------------------------------------- folders of pairs


def pair_folder(folder, texts=(), lines=(), better=("b.png", "a.JPG"), worse=("b.png", "a.JPG")):
    """Empty images by their names, prompts beside the better ones by theirs, and lines of metadata.jsonl."""
    for side, names in (("better", better), ("worse", worse)):
        (folder / side).mkdir(parents=True)
        for name in names:
            (folder / side / name).touch()
    for name, text in dict(texts).items():
        (folder / "better" / f"{name}.txt").write_text(text)
    if lines:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_folder_of_pairs_has_prompts_beside_its_better_images(tmp_path):
    folder = pair_folder(tmp_path / "pairs", {"a": "a red star\n", "b": " two blue circles"})
    (folder / "better" / ".DS_Store").touch()
    rows = load_prompts(str(folder), "prompts.train")
    assert rows == [
        Row(0, "a red star", {"better": "better/a.JPG", "worse": "worse/a.JPG"}),
        Row(1, "two blue circles", {"better": "better/b.png", "worse": "worse/b.png"}),
    ]
    assert all((row.folder / row.metadata[side]).is_file() for row in rows for side in ("better", "worse"))


def test_a_folder_of_pairs_has_prompts_and_metadata_in_lines_in_their_order(tmp_path):
    lines = [
        {"file_name": "b.png", "prompt": "b", "version": 1, "fault": "size"},
        {"prompt": "a", "file_name": "a.JPG"},
    ]
    rows = load_prompts(str(pair_folder(tmp_path / "pairs", lines=lines)), "prompts.train")
    first = {"better": "better/b.png", "worse": "worse/b.png", "version": 1, "fault": "size"}
    assert rows == [Row(0, "b", first), Row(1, "a", {"better": "better/a.JPG", "worse": "worse/a.JPG"})]


TEXTS, LINES = {"a": "a", "b": "b"}, [{"prompt": name[0], "file_name": name} for name in ("a.JPG", "b.png")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"worse": ["b.png"]}, r"better/a.JPG has no partner worse/a.JPG (1 such)"),
        ({"better": []}, r"worse/a.JPG has no partner better/a.JPG (2 such)"),
        ({"better": [], "worse": []}, "there are no images (.png, .jpg, .jpeg, .webp) in better/ and worse/"),
        ({"texts": {"b": "b"}}, "better/a.JPG has no prompt (1 such): write it into better/a.txt, or into a line"),
        ({"lines": LINES[1:]}, "better/a.JPG has no prompt (1 such)"),
        ({"texts": {"a": "a", "b": "\n"}}, "better/b.txt is empty"),
        ({"texts": {"a": "a", "b": "b\nc"}}, "better/b.txt, line 2: a pair has one prompt, in one line"),
        (
            {"texts": TEXTS | {"c": "c"}},
            "better/c.txt has no use: a folder of pairs has images and better/NAME.txt alone",
        ),
        ({"texts": TEXTS, "worse": ["a.JPG", "b.png", "b.gif"]}, "worse/b.gif has no use"),
        (
            {"texts": TEXTS, "lines": LINES},
            "better/a.txt has no use: a folder of pairs has images, prompts being in meta",
        ),
        ({"lines": [*LINES, {"prompt": "c"}]}, 'metadata.jsonl, line 3: expected "file_name"'),
        ({"lines": [{**LINES[0], "worse": "x.png"}]}, 'neither "better" nor "worse"'),
        (
            {"lines": [{"prompt": "c", "file_name": "c.png"}]},
            "line 1: there are no images better/c.png and worse/c.png",
        ),
        ({"lines": [*LINES, LINES[0]]}, "line 3: a.JPG has a prompt already, in an earlier line"),
        ({"lines": [{"file_name": "a.JPG"}]}, 'line 1: expected an object with a "prompt" that is text'),
    ],
)
def test_a_pair_that_is_none_is_named(given, message, tmp_path):
    assert message in refused(pair_folder(tmp_path / "pairs", **given))


def test_one_side_alone_has_no_partners(tmp_path):
    folder = pair_folder(tmp_path / "pairs", TEXTS)
    for file in (folder / "worse").iterdir():
        file.unlink()
    (folder / "worse").rmdir()
    assert "better/a.JPG has no partner worse/a.JPG (2 such)" in refused(folder)


def test_duplicates_are_told_once():
    rows = [Row(0, "a"), Row(1, "b"), Row(2, "a"), Row(3, "b"), Row(4, "b")]
    assert duplicate_note(rows) == "3 rows repeat an earlier one, the first 'a' (rows 1 and 3)"
    assert duplicate_note(rows[:3]) == "1 row repeats an earlier one, the first 'a' (rows 1 and 3)"
    assert duplicate_note(rows[:2]) is None
    assert duplicate_note([Row(0, "a", {"k": 1}), Row(1, "a", {"k": 2})]) is None  # the reward tells them apart
    assert duplicate_note([Row(0, "a", {"k": 1, "l": 2}), Row(1, "a", {"l": 2, "k": 1})]) is not None


def test_epochs_go_through_the_list_before_any_row_comes_again():
    rows = [Row(i, str(i)) for i in range(10)]
    drawn = [row.index for epoch in range(5) for row in epoch_rows(rows, 0, epoch, 4)]
    assert Counter(drawn[:10]) == Counter(drawn[10:]) == Counter(range(10))
    assert drawn[:10] != drawn[10:]
    assert [row.index for row in epoch_rows(rows, 0, 3, 4)] == drawn[12:16]  # a function of the epoch alone
    assert [r.index for r in epoch_rows(rows, 1, 0, 10)] != [r.index for r in epoch_rows(rows, 0, 0, 10)]


@pytest.mark.parametrize(("total", "count"), [(5, 4), (10, 4), (7, 7), (9, 8), (1000, 37)])
def test_no_row_is_twice_in_an_epoch(total, count):
    rows, epochs = [Row(i, str(i)) for i in range(total)], 300
    drawn = [[row.index for row in epoch_rows(rows, 3, epoch, count)] for epoch in range(epochs)]
    assert all(len(set(each)) == count for each in drawn)
    every = [index for each in drawn for index in each]
    laps = [every[start : start + total] for start in range(0, len(every) - total + 1, total)]
    assert all(len(set(lap)) == total for lap in laps)  # and every row is drawn before any comes again
    assert len({tuple(lap) for lap in laps}) > 1
    _order.cache_clear()
    assert [row.index for row in epoch_rows(rows, 3, epochs - 1, count)] == drawn[-1]


def test_an_epoch_larger_than_the_list():
    rows = [Row(i, str(i)) for i in range(3)]
    drawn = [row.index for row in epoch_rows(rows, 0, 1, 7)]
    whole = [row.index for row in epoch_rows(rows, 0, 0, 14)]
    assert drawn == whole[7:]
    assert Counter(whole[:12]) == {0: 4, 1: 4, 2: 4}
