"""One file a question; `python -m benchmarks` asks them all and prints ratios measured within the same run."""
