"""Pictures of a run and the files that rewards read, by their exact pixels."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from condrl import UsageError
from condrl.rewards.pixels import from_pil, read_image, to_pil
from condrl.rewards.wire import from_png, to_png
from condrl.training.pictures import LABEL_HEIGHT, grid, labelled, pages, save_comparison, save_grid


def near_levels():
    """(3, 16, 16) in [0, 1]: for each 8-bit level one value a little below it and one a little above, and the levels."""
    levels = torch.arange(256).view(16, 16)
    return [((levels + off) / 255).clamp(0, 1).expand(3, 16, 16) for off in (-0.49, -0.1, 0.0, 0.1, 0.49)], levels


def test_images_are_rounded_to_the_nearest_level():
    several, levels = near_levels()
    for x in several:
        assert np.array_equal(np.array(to_pil(x)), levels[..., None].expand(16, 16, 3).numpy())
        assert np.array_equal(np.array(Image.open(io.BytesIO(to_png(x)))), levels[..., None].expand(16, 16, 3).numpy())
        assert torch.equal(from_png(to_png(x)), levels.expand(3, 16, 16) / 255)


def test_the_picture_of_a_run_has_the_nearest_levels(tmp_path):
    several, levels = near_levels()
    big = several[1].repeat(1, 12, 12)  # large enough not to be enlarged
    save_grid(tmp_path / "new" / "x.png", [big], ["a label"])
    saved = np.array(Image.open(tmp_path / "new" / "x.png"))[6 : 6 + 192, 6 : 6 + 192]
    assert np.array_equal(saved, levels.repeat(12, 12)[..., None].expand(192, 192, 3).numpy())


@pytest.mark.parametrize(
    "label",
    [
        "",
        "two\nlines\r\nand\ta tab",
        "word " * 5000,
        "x" * 5000,
        "\u4e00\u53ea\u7ea2\u8272\u7684\u732b" * 40,
        "красный кот \u0643\u0644\u0628 ein Kätzchen",
        "emoji \U0001f600\u200d\u2028 a\x00b\x1b",
    ],
)
def test_any_prompt_can_be_a_label(tmp_path, label):
    picture = labelled(to_pil(torch.zeros(3, 64, 64)), label)
    assert picture.size == (192, 192 + LABEL_HEIGHT)
    assert not np.array(picture)[:192].any()  # it stays below the image
    save_grid(tmp_path / "x.png", [torch.zeros(3, 64, 64)], [label])


def test_letters_of_other_alphabets_are_drawn():
    """Not as the box that stands for every unknown letter."""
    drawn = [np.array(labelled(to_pil(torch.zeros(3, 64, 64)), text))[192:] for text in ("ж", "Ω", "é")]
    assert not any(np.array_equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_label_that_is_too_long_is_cut_visibly():
    short, cut, longer = (labelled(to_pil(torch.zeros(3, 64, 64)), text) for text in ("ab", "ab " * 60, "ab " * 90))
    assert np.array_equal(np.array(cut), np.array(longer))
    assert not np.array_equal(np.array(cut), np.array(short))


def test_scores_stand_before_the_labels(tmp_path):
    """Each picture's own, as its label would say it."""
    base, tuned = [torch.zeros(3, 64, 64)] * 2, [torch.ones(3, 64, 64)] * 2
    scores = [("x 0", "x 1"), ("x 0.25", "x 0.5")]
    save_comparison(tmp_path / "x.png", base, tuned, ["a star", "a square"], scores)
    labels = ["base, x 0: a star", "tuned, x 1: a star", "base, x 0.25: a square", "tuned, x 0.5: a square"]
    save_grid(tmp_path / "y.png", [base[0], tuned[0], base[1], tuned[1]], labels)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_grids_of_no_images_and_of_many_sizes(tmp_path):
    save_grid(tmp_path / "none.png", [], [])
    save_comparison(tmp_path / "none.png", [], [], [])
    assert not (tmp_path / "none.png").exists()
    tall, wide = Image.new("RGB", (10, 40), "red"), Image.new("RGB", (30, 20), "blue")
    sheet = grid([tall, wide, tall], 2, margin=5)
    assert sheet.size == (2 * 35 + 5, 2 * 45 + 5)
    pixels = np.array(sheet)
    assert (pixels[5:45, 5:15] == (255, 0, 0)).all()
    assert (pixels[5:25, 40:70] == (0, 0, 255)).all()
    assert (pixels[50:90, 5:15] == (255, 0, 0)).all()
    assert (pixels[45:50] == 255).all()
    save_grid(
        tmp_path / "x.png", [torch.zeros(3, 64, 96), torch.zeros(3, 300, 8), torch.zeros(3, 200, 220)], list("abc")
    )


def test_many_pictures_are_several_pages(tmp_path):
    """500 before | after pairs: none is higher than eight rows, and each picture is on one of them."""
    levels = torch.linspace(0, 1, 500)
    base, tuned = ([torch.full((3, 8, 8), value) for value in values] for values in (levels, 1 - levels))
    written = save_comparison(tmp_path / "x.png", base, tuned, [str(i) for i in range(500)])
    assert written == pages(tmp_path / "x.png", 1000)
    names = ["x.png", *(f"x_{number}.png" for number in range(2, 33))]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    whole, last = (Image.open(tmp_path / name) for name in ("x.png", "x_32.png"))
    side = 192 + LABEL_HEIGHT + 6
    assert whole.size == (4 * 198 + 6, 8 * side + 6)
    assert last.size == (4 * 198 + 6, 2 * side + 6)  # the 1000 tiles are 31 pages of 32 and 8
    assert last.getpixel((3 * 198 + 10, side + 10)) == (0, 0, 0)  # the last of the tuned
    assert Image.open(tmp_path / "x_2.png").getpixel((10, 10))[0] == round(255 * levels[16].item())
    assert [len(pages(tmp_path / "x.png", n)) for n in (0, 1, 32, 33, 64, 65)] == [0, 1, 1, 2, 2, 3]


# ---------------------------------------------------------------------------------------------- reading


def test_transparent_pixels_show_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    expected = torch.tensor([[1, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]]).T[:, None]
    torch.testing.assert_close(from_pil(Image.fromarray(rgba)), expected, atol=1e-3, rtol=0)
    grey = (
        Image.fromarray(rgba[..., [0, 3]], "LA")
        if hasattr(Image, "LA")
        else Image.merge("LA", [Image.fromarray(rgba[..., i]) for i in (0, 3)])
    )
    torch.testing.assert_close(from_pil(grey)[0, 0], torch.tensor([1, 1, 0.8]), atol=1e-3, rtol=0)


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1]]).T[:, None]
    assert torch.equal(from_pil(image), expected)
    image.info["transparency"] = 1
    file = io.BytesIO()
    image.save(file, "PNG")
    assert torch.equal(from_pil(Image.open(file)), torch.tensor([[1.0, 0, 0], [1, 1, 1]]).T[:, None])


def test_16_bits_of_grey_keep_their_value(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", "test")
    torch.testing.assert_close(found, torch.tensor(values / 65535).float().expand(3, 1, 4))
    assert torch.equal(from_pil(Image.fromarray(values.astype(np.int32))), found)
    assert torch.equal(from_pil(Image.fromarray(found[0].numpy())), found)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_are_colours(mode):
    x = from_pil(Image.new("RGB", (4, 2), "white").convert(mode))
    assert x.shape == (3, 2, 4)
    assert (x > 0.99).all()


def test_a_photograph_is_turned_as_its_tag_says(tmp_path):
    """Orientation 6: the camera was held upright, the sensor's first row is the right side."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    found = read_image(tmp_path / "x.png", "test")
    assert found.shape == (3, 16, 8)
    assert (found[:, :, 7] == 1).all()
    assert (found[:, :, :7] == 0).all()


@pytest.mark.parametrize("kind", ["pointer", "empty", "text", "cut", "bomb", "folder", "missing"])
def test_an_image_that_cannot_be_read_is_one_line(tmp_path, kind, monkeypatch):
    path = tmp_path / "x.png"
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    contents = {
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "empty": b"",
        "text": b"no image at all",
        "cut": file.getvalue()[:5000],
        "bomb": file.getvalue(),
    }
    said = {
        "pointer": "is a Git LFS pointer",
        "empty": "is empty",
        "text": "cannot be read as an image: UnidentifiedImageError",
        "cut": "cannot be read as an image: ",
        "bomb": "cannot be read as an image: DecompressionBombError",
        "folder": "is a folder",
        "missing": "does not exist",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UsageError) as error, warnings.catch_warnings():
        read_image(path, "config rewards.similarity.images")
    assert str(error.value).startswith(f"config rewards.similarity.images: {path} {said[kind]}")
    assert "\n" not in str(error.value)
