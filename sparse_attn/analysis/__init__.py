"""What a pattern or method loses, which pattern to take, and patterns fitted to data."""

from sparse_attn.analysis.fitting import fit_pattern, gradient_pattern
from sparse_attn.analysis.recommendation import (
    Recommendation,
    Recommendations,
    recommend_pattern,
)
from sparse_attn.analysis.recording import record_attention
from sparse_attn.analysis.report import ApproximationReport, approximation_report

__all__ = [
    "ApproximationReport",
    "Recommendation",
    "Recommendations",
    "approximation_report",
    "fit_pattern",
    "gradient_pattern",
    "recommend_pattern",
    "record_attention",
]
