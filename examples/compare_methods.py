"""Train the same small model on a long-range task with each method of attention.

The task is associative recall: the first half of a sequence of 2048 tokens states facts, a key and
a value each, and the last tokens ask for the values of keys. Fixed windows cannot see the facts;
methods that choose keys by content can learn to. Each method is trained from the same seed, on the
same batches, in a process of its own, so that its memory is its own; one table and one picture show
accuracy, time and memory. What is done is kept in --out: with --resume a stopped run goes on with
the methods that are missing.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from long_text.command import HelpFormatter, count, measure_apart, pick, positive
from long_text.training import set_threads
from recall.measure import Settings, measure
from recall.methods import METHODS
from recall.plots import save_figure

OPTIONS = {
    "length": "tokens of a sequence",
    "keys": "keys that have a value, and questions",
    "layers": "layers",
    "width": "channels",
    "heads": "attention heads",
    "batch": "sequences of a step",
    "steps": "updates with each method",
}


def make_parser() -> argparse.ArgumentParser:
    """All options; their defaults are those of Settings."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # the options are handed on
    )
    add, settings = parser.add_argument, Settings()
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="which ones to train")  # fmt: skip
    for name, meaning in OPTIONS.items():
        add(f"--{name}", type=positive(int), default=getattr(settings, name), help=meaning)
    add("--learning-rate", type=positive(float), default=settings.learning_rate, help="at its top")
    add("--seed", type=count, default=settings.seed, help="of weights and batches (default: 0)")
    add("--threads", type=positive(int), help="CPU threads instead of torch's choice")
    add("--out", type=Path, default=Path("runs/methods"), help="directory for the results")
    add("--resume", action="store_true", help="keep the results in --out, train what is missing")
    add("--measure", choices=METHODS, help=argparse.SUPPRESS)  # one of them
    return parser


def report(results: dict[str, dict], chance: float) -> None:
    """Print all runs in one table, the most accurate first."""
    print(f"\n{'method':<18} {'answered':>9} {'ms/step':>9} {'training MiB':>13} {'last loss':>10}")
    for method, result in sorted(results.items(), key=lambda item: -item[1]["accuracy"]):
        print(
            f"{method:<18} {100 * result['accuracy']:>7.1f} % "
            f"{1e3 * median(result['seconds']):>9.0f} {result['training_memory'] / 2**20:>13.0f} "
            f"{result['losses'][-1]:>10.4f}"
        )
    print(
        f"answered: questions told right in sequences never seen; chance is {100 * chance:.1f} %\n"
        "ms/step: the median; training: peak memory less what the process held before its first "
        "step"
    )


def load_results(path: Path, settings: Settings) -> dict[str, dict]:
    """The results of an earlier run, which must have had the same settings."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if stored["settings"] != asdict(settings):
        raise ValueError(
            f"{path} was made with {stored['settings']}, not {asdict(settings)}: give the same "
            "options, or another --out"
        )
    return stored["methods"]


def compare(args: argparse.Namespace, settings: Settings) -> int:
    """Run this script with each method, one after the other; returns the exit status."""
    chance = 1 / settings.task.values  # a task that cannot be raises here
    path = args.out / "results.json"
    results = load_results(path, settings) if args.resume else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for method in args.methods:
        if method in results:
            continue
        result = measure_apart(__file__, method)
        if isinstance(result, int):
            return result  # it has said why
        results[method] = result
        kept = {"settings": asdict(settings), "methods": results}
        path.write_text(json.dumps(kept) + "\n")
    report(results, chance)
    save_figure(args.out / "methods.png", results, chance)
    print(f"{args.out}: methods.png, results.json")
    return 0


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.threads:
        set_threads(args.threads)
    try:
        settings = pick(Settings, args)
        if not args.measure:
            return compare(args, settings)
        print(json.dumps(measure(args.measure, settings)))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("Interrupted. What is done is kept: --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
