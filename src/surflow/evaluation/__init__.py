"""Every number and every picture of a trained model."""

import surflow.evaluation._until_merge  # noqa: F401
