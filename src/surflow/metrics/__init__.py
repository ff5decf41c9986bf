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
from surflow.metrics.samples import IMAGE_UNIT, BrokenSamples, as_images, draw, draw_unit

__all__ = [
    "IMAGE_UNIT",
    "BrokenSamples",
    "GenerationProtocol",
    "Score",
    "Stopwatch",
    "as_images",
    "check_inception_weights",
    "draw",
    "draw_unit",
    "frechet_distance",
    "generation_scores",
    "generation_seconds",
    "score_generation",
    "shown_progress",
]
