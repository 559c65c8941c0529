"""`make bench`: what codistillation costs, as ratios measured within one run.

Nothing here passes or fails; each line shows the goal beside what was measured.
"""

import argparse
import platform

import torch

from benchmarks import (
    bytes_per_update,
    exchange_cost,
    many_peers,
    memory,
    prediction_cost,
    timm_update_cost,
    update_cost,
)

QUESTIONS = {
    "update": update_cost,
    "timm": timm_update_cost,
    "prediction": prediction_cost,
    "exchange": exchange_cost,
    "memory": memory,
    "bytes": bytes_per_update,
    "peers": many_peers,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("question", nargs="*", help=f"some of {', '.join(QUESTIONS)}; all without it")
    asked = parser.parse_args().question or list(QUESTIONS)
    unknown = sorted(set(asked) - set(QUESTIONS))
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join(QUESTIONS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name in asked:
        print(f"\n{name}: {(QUESTIONS[name].__doc__ or '').splitlines()[0]}", flush=True)
        for line in QUESTIONS[name].measure():
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
