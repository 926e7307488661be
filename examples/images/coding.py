"""A pixel as a step from a prediction, as lossless image formats code it."""

import torch
import torch.nn.functional as F


def shifted(x: torch.Tensor, down: int, right: int, fill: int = 0) -> torch.Tensor:
    """x (..., rows, columns) with `x[i - down, j - right]` at (i, j) and `fill` from outside."""
    rows, columns = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    return padded[..., 1 - down : 1 - down + rows, 1 - right : 1 - right + columns]


def neighbors(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixels left, above, and above left; at an edge the nearest one of them that exists."""
    left, up, corner = (shifted(pixels, *offset) for offset in ((0, 1), (1, 0), (1, 1)))
    left[..., 0] = corner[..., 0] = up[..., 0]
    up[..., 0, :] = corner[..., 0, :] = left[..., 0, :]
    return left, up, corner


def residuals(pixels: torch.Tensor) -> torch.Tensor:
    """Each pixel less the median of left, up and left + up - corner, mod 256.

    This is the predictor of JPEG-LS (Weinberger et al. 2000). Given the pixels before, a pixel and
    its residual determine each other: bits per residual are bits per pixel.
    """
    left, up, corner = neighbors(pixels)
    predicted = torch.stack([left, up, left + up - corner]).median(dim=0).values
    return (pixels - predicted) % 256


def activity(pixels: torch.Tensor) -> torch.Tensor:
    """How much the image changes around each pixel, as far as the pixels before it tell."""
    left, up, corner = neighbors(pixels)
    return (left - corner).abs() + (up - corner).abs()
