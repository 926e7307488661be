"""A pixel as a step from a prediction, as lossless image formats code it."""

import torch
import torch.nn.functional as F


def neighbors(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixels left, above, and above left; at an edge the nearest one of them that exists.

    Nothing comes before the first pixel: its neighbors are 0.
    """
    rows, columns = pixels.shape[-2:]
    padded = F.pad(pixels, (1, 0, 1, 0))
    left, up = padded[..., 1:, :columns].clone(), padded[..., :rows, 1:].clone()
    corner = padded[..., :rows, :columns].clone()
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
