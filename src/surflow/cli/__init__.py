"""Commands: train, evaluate, sample, reproduce, report, verify, layers, bench."""
