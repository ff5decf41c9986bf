"""Scores of samples: Inception score, FID, and what makes them comparable."""

from surflow.metrics.command import check_inception_weights, score_generation, shown_progress
from surflow.metrics.generation import (
    GenerationProtocol,
    Score,
    Stopwatch,
    frechet_distance,
    generation_scores,
    generation_seconds,
)
from surflow.metrics.samples import IMAGE_UNIT, draw, draw_unit

__all__ = [
    "IMAGE_UNIT",
    "GenerationProtocol",
    "Score",
    "Stopwatch",
    "check_inception_weights",
    "draw",
    "draw_unit",
    "frechet_distance",
    "generation_scores",
    "generation_seconds",
    "score_generation",
    "shown_progress",
]
