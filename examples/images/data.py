"""Photographs: reading them, holding a part out, and drawing crops to train on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from long_text.data import DataError
from PIL import Image

HELD_OUT = 0.2  # of the width of a single photograph
EVERY = 10  # of several photographs, one of so many is held out
MOST_CROPS = 24  # that are measured


@dataclass(frozen=True)
class Photos:
    """Grayscale images (rows, columns), and the square crops (side, side) that are measured."""

    name: str
    train: list[np.ndarray]
    held_out: list[np.ndarray]

    @property
    def fingerprint(self) -> str:
        """Tells these photographs and crops from others."""
        digest = hashlib.sha256()
        for image in (*self.train, *self.held_out):
            digest.update(repr(image.shape).encode() + image.tobytes())
        return digest.hexdigest()


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def _tiles(image: np.ndarray, side: int) -> list[np.ndarray]:
    """The squares that an image is cut into; what is left over at its ends is not used."""
    rows, columns = (range(0, size - side + 1, side) for size in image.shape)
    return [image[r : r + side, c : c + side] for r in rows for c in columns]


def _one_photo(side: int) -> Photos:
    """The portrait that matplotlib ships, without its middle columns, and those."""
    from matplotlib import cbook

    image = _read(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    width = max(side, int(HELD_OUT * image.shape[1]))
    start = (image.shape[1] - width) // 2
    if side > min(start, image.shape[0]):
        raise DataError(f"the photograph {image.shape} has no room for crops of --side {side}")
    sides = [image[:, :start], image[:, start + width :]]
    return Photos("grace_hopper.jpg", sides, _tiles(image[:, start : start + width], side))


def _folder(folder: Path, side: int) -> Photos:
    """The user's images; every tenth one, in order of names, is held out whole."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"cannot read --images {folder}: {error.strerror}") from None
    images = []
    for path in paths:
        try:
            image = _read(path)
        except OSError:  # not an image
            continue
        if min(image.shape) >= side:
            images.append(image)
    if len(images) < 2:
        raise DataError(
            f"--images {folder} holds {len(images)} images of at least {side} x {side} pixels, "
            "but 2 are needed"
        )
    train = [image for i, image in enumerate(images) if i % EVERY]
    return Photos(str(folder), train, [t for image in images[::EVERY] for t in _tiles(image, side)])


def load_photos(folder: Path | None, side: int) -> Photos:
    """Read the images of `folder`, or the photograph that matplotlib ships.

    Of many held-out crops some are measured, spread evenly over them.
    """
    photos = _one_photo(side) if folder is None else _folder(folder, side)
    crops = photos.held_out
    if len(crops) > MOST_CROPS:
        places = np.linspace(0, len(crops) - 1, MOST_CROPS).round().astype(int)
        crops = [crops[place] for place in places]
    return Photos(photos.name, photos.train, crops)


def as_pixels(crops: list[np.ndarray]) -> torch.Tensor:
    """Crops as one tensor (batch, side, side) of ints."""
    return torch.from_numpy(np.stack(crops).astype(np.int64))


def training_crops(
    images: list[np.ndarray], side: int, batch: int, step: int, seed: int
) -> torch.Tensor:
    """Pixels (batch, side, side) of one step, half of the crops mirrored: a function of (seed,
    step) alone."""
    rng = np.random.default_rng([seed, step])
    places = np.array([(h - side + 1) * (w - side + 1) for h, w in (x.shape for x in images)])
    crops = []
    for number in rng.choice(len(images), size=batch, p=places / places.sum()):
        image = images[number]
        row, column = (int(rng.integers(size - side + 1)) for size in image.shape)
        crop = image[row : row + side, column : column + side]
        crops.append(crop[:, ::-1] if rng.integers(2) else crop)
    return as_pixels(crops)
