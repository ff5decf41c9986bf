"""Every number and every picture of a trained model."""
