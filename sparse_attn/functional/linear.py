"""Linear attention: a kernel of features in place of the softmax, and Performer's features that
approximate it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.functional._common import (
    check_dtype,
    check_flag,
    repeat_heads,
    scale_of,
    without_autocast,
)
from sparse_attn.functional._features import (
    KERNEL_EPS,
    ROW,
    RUNNING,
    FeatureMap,
    Inputs,
    all_products,
    causal_products,
    check_eps,
    default_num_features,
    draw_orthogonal,
    drawn,
    elu_plus_one,
    map_features,
    normalise,
    prepare,
)
from sparse_attn.patterns.arguments import index as integer
from sparse_attn.patterns.arguments import seed as check_seed

#: e^x for x up to this is a float32; powers beyond belong to keys whose features are 0.
LARGEST_POWER = 80.0


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Linear attention (Katharopoulos et al. 2020, section 3.2; causal, section 3.3).

    output[i] = φ(query[i]) Σ_j φ(key[j])ᵀ value[j] / (φ(query[i]) · Σ_j φ(key[j]) + eps), over the
    keys j that query i sees. Time and memory are linear in the length, forward and backward; the
    causal sums are a kernel of their own (`torch.ops.sparse_attn.causal_products`). A query that
    sees no key gives 0. There is no scale: put one into the feature map.

    Args:
        query: (batch, heads, n_q, head_dim), float64, float32, bfloat16 or float16.
        key: (batch, heads_kv, n_k, head_dim).
        value: (batch, heads_kv, n_k, value_dim).
        feature_map: φ, from (batch, heads, length, head_dim) to (batch, heads, length, m), row by
            row; elu(x) + 1 if None. It gets half types as float32.
        eps: Added to the normaliser.
        key_padding_mask: (batch, n_k) bool, True = ignore this key, in both sums.
        is_causal: Whether query i, at position i + n_k - n_q, sees only keys up to that position.
        enable_gqa: Whether heads may be a multiple of heads_kv.

    Returns:
        (batch, heads, n_q, value_dim), of query's dtype (under autocast, of its).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key, value = (torch.randn(2, 4, 1000, 32) for _ in range(3))
    >>> linear_attention(query, key, value, is_causal=True).shape
    torch.Size([2, 4, 1000, 32])
    >>> linear_attention(query, key, value, feature_map=torch.nn.functional.softplus).shape
    torch.Size([2, 4, 1000, 32])
    """
    eps = check_eps(eps)
    _check_map(feature_map)
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    inputs = prepare(query, key, value, key_padding_mask, enable_gqa)
    with without_autocast(inputs.query):
        return _linear(inputs, feature_map or elu_plus_one, eps, key_padding_mask, is_causal)


def _check_map(feature_map: FeatureMap | None) -> None:
    if feature_map is not None and not callable(feature_map):
        raise TypeError(
            f"sparse_attn: expected feature_map to be callable, got {type(feature_map).__name__}"
        )


def _linear(
    inputs: Inputs,
    feature_map: FeatureMap,
    eps: float,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    query, key = map_features(feature_map, inputs.query, inputs.key, key_padding_mask)
    if is_causal:
        sums = causal_products(query, key, inputs.value)
    else:
        sums = all_products(query, ops.outer_sums(key, inputs.value))
    return normalise(sums, eps, inputs.dtype)


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_features: int | None = None,
    projection: Tensor | None = None,
    seed: int = 0,
    kernel: str = "softmax",
    eps: float | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Performer: softmax attention by random features (FAVOR+, Choromanski et al. 2021).

    With x' = x √scale and the rows w of the projection, features are

        φ(x) = m^-½ (exp(w · x' - |x'|² / 2 - c) + eps)            (lemma 1 and section 4)

    where c is the largest w · x' of the query, or of all keys that are not padded. The output is
    that of linear attention, φ(Q) (φ(K)ᵀ V) / (φ(Q) · Σ φ(K)); with eps = 0 its expectation over
    the projections tends to that of softmax(scale · QKᵀ) V as m grows. A causal row i is what a
    call with the keys up to i alone would give: its c is of the keys that it sees, so nothing of
    later ones comes in. With kernel="relu" features are relu(w · x') + eps.

    Time and memory are linear in the length. Gradients are exact, those through c as well.

    Args:
        query: (batch, heads, n_q, head_dim), float64, float32, bfloat16 or float16. Features are
            computed in float32 at least.
        key: (batch, heads_kv, n_k, head_dim).
        value: (batch, heads_kv, n_k, value_dim).
        num_features: m; int(head_dim ln head_dim) if None.
        projection: (m, head_dim) or (heads, m, head_dim) in place of one that is drawn,
            differentiable; see `orthogonal_features`.
        seed: Of the projection: the same numbers on every device.
        kernel: "softmax" or "relu".
        eps: Added to features; 1e-4 for softmax and 1e-3 for relu if None.
        scale: At least 0; 1 / √head_dim if None.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        is_causal: Whether query i, at position i + n_k - n_q, sees only keys up to that position.
        enable_gqa: Whether heads may be a multiple of heads_kv.

    Returns:
        (batch, heads, n_q, value_dim), of query's dtype (under autocast, of its). A query that
        sees no key gives 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    >>> estimate = performer_attention(query / 4, key, value, num_features=4096, eps=0)
    >>> exact = torch.nn.functional.scaled_dot_product_attention(query / 4, key, value)
    >>> bool((estimate - exact).square().mean() < 0.2 * exact.square().mean())
    True
    """
    kernel, eps = check_kernel(kernel, eps)
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    inputs = prepare(query, key, value, key_padding_mask, enable_gqa)
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[3]
    scale = check_scale(scale, head_dim)
    if projection is None:
        count = default_num_features(head_dim) if num_features is None else num_features
        shape = (integer("num_features", count, 1), head_dim)
        projection = drawn(shape, "chi", check_seed(seed), inputs.query.dtype, inputs.query.device)
    else:
        projection = check_projection(projection, num_features, inputs.query)
    inputs = inputs._replace(key=repeat_heads(inputs.key, heads))
    inputs = inputs._replace(value=repeat_heads(inputs.value, heads))
    with without_autocast(inputs.query):
        if kernel == "relu":
            feature_map = relu_features(projection, scale, eps)
            return _linear(inputs, feature_map, 0.0, key_padding_mask, is_causal)
        softmax = _causal_softmax if is_causal else _softmax
        return softmax(inputs, projection, scale, eps, key_padding_mask)


def _softmax(
    inputs: Inputs, projection: Tensor, scale: float, eps: float, padding: Tensor | None
) -> Tensor:
    options = scale, eps
    sums, *_ = ops.feature_products(inputs.key, projection, inputs.value, padding, True, *options)
    rows, *_ = ops.feature_products(inputs.query, projection, sums, None, False, *options)
    return normalise(rows, 0.0, inputs.dtype)


def _causal_softmax(
    inputs: Inputs, projection: Tensor, scale: float, eps: float, padding: Tensor | None
) -> Tensor:
    """Sums of exp(… - c_i) + eps over the keys up to i: c_i is a factor of the row, eps a sum of
    values."""
    query, weight, *_ = ops.positive_features(inputs.query, projection, None, ROW, scale, eps)
    key, _, maximum, *_ = ops.positive_features(
        inputs.key, projection, padding, RUNNING, scale, eps
    )
    n_q = query.shape[2]
    power = at_queries(maximum.unsqueeze(-1), n_q).neg().clamp(max=LARGEST_POWER)
    sums = ops.causal_products(query, key, inputs.value) * power.exp()
    if eps:
        rest = at_queries(inputs.value.cumsum(2), n_q)
        sums = sums + rest * (weight * eps_of_sums(eps, projection)).unsqueeze(-1)
    return normalise(sums, 0.0, inputs.dtype)


def eps_of_sums(eps: float, projection: Tensor) -> float:
    """What eps adds to a key's feature."""
    return eps / projection.shape[-2] ** 0.5


def at_queries(of_keys: Tensor, n_q: int) -> Tensor:
    """Rows of (batch, heads, n_k, …) at the positions of queries; 0 before the first key."""
    missing = n_q - of_keys.shape[2]
    if missing <= 0:
        return of_keys[:, :, -missing:]
    return F.pad(of_keys, (0, 0, missing, 0))


def relu_features(projection: Tensor, scale: float, eps: float) -> FeatureMap:
    """The feature map relu(w · x √scale) + eps."""
    scaled = (projection * scale**0.5).mT
    return lambda x: F.relu(x @ scaled) + eps


def check_kernel(kernel: str, eps: float | None) -> tuple[str, float]:
    """The kernel, and the eps that holds for it."""
    if not isinstance(kernel, str) or kernel not in KERNEL_EPS:
        raise ValueError(
            f"sparse_attn: expected kernel to be one of {', '.join(KERNEL_EPS)}, got {kernel!r}"
        )
    return kernel, KERNEL_EPS[kernel] if eps is None else check_eps(eps)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale that holds; random features need one of at least 0."""
    scale = scale_of(scale, head_dim)
    if scale < 0:
        raise ValueError(f"sparse_attn: expected scale to be at least 0, got {scale}")
    return scale


def check_projection(projection: Tensor, num_features: int | None, query: Tensor) -> Tensor:
    """The projection in query's dtype, if it fits to (batch, heads, length, head_dim)."""
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        what = getattr(projection, "dtype", type(projection).__name__)
        raise TypeError(
            f"sparse_attn: expected projection to be a floating-point Tensor, got {what}"
        )
    heads, head_dim = query.shape[1], query.shape[3]
    shape = tuple(projection.shape)
    fits = shape[-1:] == (head_dim,) and (
        len(shape) == 2 or (len(shape) == 3 and shape[0] == heads)
    )
    if not fits or shape[-2] == 0:
        raise ValueError(
            f"sparse_attn: expected projection of shape (m, {head_dim}) or ({heads}, m, "
            f"{head_dim}), m at least 1, got {shape}"
        )
    if num_features is not None and num_features != shape[-2]:
        raise ValueError(
            f"sparse_attn: expected num_features to be None or that of projection, {shape[-2]}, "
            f"got {num_features}"
        )
    if projection.device != query.device:
        raise ValueError(
            f"sparse_attn: expected projection on device {query.device}, got {projection.device}"
        )
    return projection.to(query.dtype)


def orthogonal_features(
    num_features: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    norms: str = "chi",
    seed: int | torch.Generator = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random projection for `performer_attention`: Gaussian rows, orthogonal in blocks.

    Blocks of head_dim rows are orthogonal to each other; directions are uniform, so features are
    unbiased, of less variance than independent ones (Choromanski et al. 2021, section 3.2 and
    theorem 2). They are drawn on the CPU in float64: a seed gives the same numbers on every device.

    Args:
        num_features: Rows, m.
        head_dim: Size of a row.
        num_heads: Draw as many projections; one for all heads if None.
        norms: "chi" for lengths as of Gaussian rows, "sqrt" for √head_dim each.
        seed: An int, or a generator of the CPU to go on with.
        dtype: Of the result; torch's default if None.
        device: Of the result.

    Returns:
        (num_features, head_dim) or (num_heads, num_features, head_dim).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is too small, or norms is unknown.

    >>> import torch
    >>> projection = orthogonal_features(100, 32, seed=1)
    >>> products = projection[:32] @ projection[:32].mT
    >>> bool((products - products.diag().diag()).abs().max() < 1e-4)
    True
    """
    shape = (integer("num_features", num_features, 1), integer("head_dim", head_dim, 1))
    if num_heads is not None:
        shape = (integer("num_heads", num_heads, 1), *shape)
    check_dtype(dtype)
    if norms not in ("chi", "sqrt"):
        raise ValueError(f"sparse_attn: expected norms to be chi or sqrt, got {norms!r}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(seed, torch.Generator):
        return drawn(shape, norms, check_seed(seed), dtype, torch.empty(0, device=device).device)
    if seed.device.type != "cpu":
        raise ValueError(
            f"sparse_attn: expected seed to be a generator of the CPU, got one of {seed.device}"
        )
    return draw_orthogonal(shape, norms, seed).to(dtype=dtype, device=device)
