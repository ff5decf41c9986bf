"""Grids of images: every pixel against a loop over images and pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from surflow.reporting.figures.images import image_grid, tile, write_image


def random_images(n, channels, height=4, width=5, levels=256, seed=0):
    shape = (n, channels, height, width)
    return np.random.default_rng(seed).integers(0, levels, shape).astype(np.uint8)


def by_hand(images, columns, scale, gap, levels=256):
    """(H, W, C) of the picture, pixel by pixel."""
    n, channels, height, width = images.shape
    columns = min(columns, n)
    rows = (n + columns - 1) // columns
    size = (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels)
    sheet = np.full(size, 255, np.uint8)
    for i in range(n):
        top = gap + (i // columns) * (height * scale + gap)
        left = gap + (i % columns) * (width * scale + gap)
        for y in range(height * scale):
            for x in range(width * scale):
                for c in range(channels):
                    level = int(images[i, c, y // scale, x // scale])
                    sheet[top + y, left + x, c] = round(level * 255 / (levels - 1))
    return sheet


@pytest.mark.parametrize(
    ("n", "channels", "columns", "scale", "gap", "levels"),
    [(6, 3, 3, 2, 2, 256), (5, 3, 4, 1, 0, 256), (3, 1, 8, 3, 1, 17), (1, 1, 1, 1, 2, 2)],
)
def test_grid(tmp_path, n, channels, columns, scale, gap, levels):
    images = random_images(n, channels, levels=levels)
    path = image_grid(images, tmp_path / "new" / "grid.png", columns, scale, levels, gap)
    picture = np.asarray(Image.open(path))
    assert picture.ndim == (3 if channels == 3 else 2)
    expected = by_hand(images, columns, scale, gap, levels)
    assert np.array_equal(picture.reshape(expected.shape), expected)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]  # nothing half-written


def test_tiles_are_the_grid_without_a_file():
    images = random_images(5, 1, levels=17)
    assert np.array_equal(tile(images, 3, 1, 17), by_hand(images, 3, 1, 1, 17))
    assert tile(images, 8).shape == (4 + 2 * 2, 5 * 5 + 6 * 2, 1)


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (16, 4), (28, 2), (32, 2), (64, 2)])
def test_small_images_are_enlarged(tmp_path, side, scale):
    path = image_grid(random_images(1, 1, side, side), tmp_path / "grid.png", gap=0)
    assert Image.open(path).size == (side * scale, side * scale)


def test_the_same_images_give_the_same_bytes(tmp_path):
    images = random_images(7, 3)
    one = image_grid(images, tmp_path / "one.png").read_bytes()
    assert one == image_grid(images.astype(np.int64), tmp_path / "two.png").read_bytes()
    assert one != image_grid(images[::-1], tmp_path / "three.png").read_bytes()


@pytest.mark.parametrize(("channels", "levels"), [(3, 256), (1, 16)])
def test_one_image(tmp_path, channels, levels):
    image = random_images(1, channels, levels=levels)[0]
    path = write_image(image, tmp_path / "one.png", levels)
    found = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    expected = by_hand(image[None], 1, 1, 0, levels)
    assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 2, 4, 4), np.uint8), {}, r"1 or 3 channels, got \(2, 2, 4, 4\)"),
        (np.zeros((0, 3, 4, 4), np.uint8), {}, r"got \(0, 3, 4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), {}, r"got \(3, 4, 4\)"),
        (np.zeros((1, 3, 4, 4)), {}, "integer levels, got float64"),
        (np.full((1, 3, 4, 4), 17), {"num_levels": 17}, "levels 0 to 16, got some from 17 to 17"),
        (np.full((1, 3, 4, 4), -1), {}, "from -1"),
        (np.zeros((1, 3, 4, 4), int), {"num_levels": 1}, "num_levels: expected 2 to 256, got 1"),
        (np.zeros((1, 3, 4, 4), int), {"columns": 0}, "columns: expected at least 1, got 0"),
    ],
)
def test_wrong_images(tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, tmp_path / "grid.png", **options)
    assert not list(tmp_path.iterdir())
