"""Commands: train, evaluate, sample, reproduce, report, verify."""
