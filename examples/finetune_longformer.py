"""Fine-tune a Hugging Face Longformer on long documents, before and after one line.

The line is `sparse_attn.huggingface.replace_attention(model)`. A small Longformer with random
weights learns to tell C++, Python and English prose apart, byte by byte, 2048 bytes a document:
once as transformers has it and once after the swap, from the same weights, on the same batches,
each in a process of its own. The losses are the same; time and memory are not. The documents are
headers of torch, modules of CPython and its language reference, which every machine has.

It needs transformers: pip install "transformers>=4.57".
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from finetune.data import HELD_OUT, KINDS, load_documents
from finetune.measure import ATTENTIONS, Settings, measure
from finetune.plots import save_figure
from long_text.command import HelpFormatter, count, measure_apart, pick, positive
from long_text.data import DataError
from long_text.training import set_threads

OPTIONS = {
    "length": "bytes of a document",
    "window": "tokens of the window, half on each side",
    "layers": "layers",
    "width": "channels",
    "heads": "attention heads",
    "batch": "documents of a step",
    "steps": "updates with each attention",
}


def make_parser() -> argparse.ArgumentParser:
    """All options; their defaults are those of Settings."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # the options are handed on
    )
    add, settings = parser.add_argument, Settings()
    for name, meaning in OPTIONS.items():
        add(f"--{name}", type=positive(int), default=getattr(settings, name), help=meaning)
    add("--learning-rate", type=positive(float), default=settings.learning_rate, help="at its top")
    add("--seed", type=count, default=settings.seed, help="of weights and batches (default: 0)")
    add("--threads", type=positive(int), help="CPU threads instead of torch's choice")
    add("--out", type=Path, default=Path("runs/finetune"), help="directory for the results")
    add("--measure", choices=ATTENTIONS, help=argparse.SUPPRESS)  # one of the two
    return parser


def report(results: dict[str, dict]) -> None:
    """Print both runs side by side."""
    print(
        f"\n{'attention':<10} {'s/step':>7} {'training MiB':>13} {'last loss':>10} {'held out':>9}"
    )
    for attention, result in results.items():
        print(
            f"{attention:<10} {median(result['seconds']):>7.3f} "
            f"{result['training_memory'] / 2**20:>13.0f} {result['losses'][-1]:>10.5f} "
            f"{100 * result['accuracy']:>7.0f} %"
        )
    old, new = (results[attention] for attention in ATTENTIONS)
    apart = max(abs(a - b) for a, b in zip(old["losses"], new["losses"], strict=True))
    print(
        f"s/step: the median; training: peak memory less what the process held before its first "
        f"step;\nheld out: documents told right, of {HELD_OUT * len(KINDS)} that it never saw\n"
        f"The losses differ by at most {apart:.1e}; a step takes "
        f"{median(old['seconds']) / median(new['seconds']):.1f} times less time and "
        f"{old['training_memory'] / max(1, new['training_memory']):.1f} times less memory."
    )


def compare(args: argparse.Namespace) -> int:
    """Run this script with either attention, one after the other; returns the exit status."""
    results = {}
    for attention in ATTENTIONS:
        result = measure_apart(__file__, attention)
        if isinstance(result, int):
            return result  # it has said why
        results[attention] = result
    report(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results) + "\n")
    save_figure(args.out / "finetune.png", results)
    print(f"{args.out}: finetune.png, results.json")
    return 0


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.threads:
        set_threads(args.threads)
    try:
        if not args.measure:
            return compare(args)
        settings = pick(Settings, args)
        documents = load_documents(settings.length, settings.seed)
        print(json.dumps(measure(args.measure, *documents, settings)))
    except (DataError, ImportError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
