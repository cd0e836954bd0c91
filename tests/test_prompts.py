from collections import Counter

import pytest

from condrl import UsageError
from condrl.prompts import Row, epoch_rows, load_prompts


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \none\n")
    rows = load_prompts(str(tmp_path / "a.txt"), "prompts.train")
    assert rows == [Row(0, "one"), Row(1, "two"), Row(2, "one")]  # the same words twice are two rows
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "target": 3}\n{"prompt": "two"}\n')
    rows = load_prompts(str(tmp_path / "b.jsonl"), "prompts.train")
    assert rows == [Row(0, "one", {"target": 3}), Row(1, "two")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("3\n", 'line 1: expected an object with a "prompt"'),
        ('{"prompt": 1}', "text"),
        ("{", "not JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_prompts(str(tmp_path / "a.jsonl"), "prompts.train")


def test_epochs_go_through_the_list_before_any_row_comes_again():
    rows = [Row(i, str(i)) for i in range(10)]
    drawn = [row.index for epoch in range(5) for row in epoch_rows(rows, 0, epoch, 4)]
    assert Counter(drawn[:10]) == Counter(drawn[10:]) == Counter(range(10))
    assert drawn[:10] != drawn[10:]
    assert [row.index for row in epoch_rows(rows, 0, 3, 4)] == drawn[12:16]  # a function of the epoch alone
    assert [r.index for r in epoch_rows(rows, 1, 0, 10)] != [r.index for r in epoch_rows(rows, 0, 0, 10)]


def test_an_epoch_larger_than_the_list():
    rows = [Row(i, str(i)) for i in range(3)]
    drawn = [row.index for row in epoch_rows(rows, 0, 1, 7)]
    whole = [row.index for row in epoch_rows(rows, 0, 0, 14)]
    assert drawn == whole[7:]
    assert Counter(whole[:12]) == {0: 4, 1: 4, 2: 4}
