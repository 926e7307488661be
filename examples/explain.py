"""Show what a trained byte-level model looks at, as pictures.

It draws the attention weights of every head on a stretch of held-out text, how they fall with the
distance, how much of them goes to the global bytes, and attention rollout: from where, through all
layers, the information of a byte comes. The model is the one that train_long_text.py left in
runs/long_text; if there is none, a short one is trained first. Everything is computed from
attention(…, return_weights=True), in memory linear in the length.
"""

import argparse
import sys
from pathlib import Path

import torch
from long_text.command import HelpFormatter, count, positive
from long_text.data import DataError, load_corpus
from long_text.insight import distance_profile, layer_weights, rollout, share_of_first, stretch
from long_text.insight_plots import save_distances, save_heads, save_rollout, save_shares
from long_text.model import ByteModel, Config, build_model
from long_text.training import Settings, Trainer, load_checkpoint

LEFT_BY_TRAINING = Path("runs/long_text/checkpoint.pt")


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    whole = positive(int)
    add = parser.add_argument_group("text").add_argument
    add("--text", type=Path, metavar="FILE", help="this file instead of the Python reference")
    add("--length", type=whole, default=2048, help="held-out bytes that the model reads")
    add("--start", type=count, default=0, help="where in the held-out text they start (default: 0)")
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"of train_long_text.py (default: {LEFT_BY_TRAINING}, else one trained here)",
    )
    add("--steps", type=whole, default=100, help="updates, if a model must be trained")
    config = Config()
    for name in ("layers", "width", "heads", "window"):
        add(f"--{name}", type=whole, default=getattr(config, name), help="of a model trained here")
    add("--train-length", type=whole, default=1024, help="bytes of its sequences")
    add("--seed", type=count, default=0, help="of its weights and data (default: 0)")
    add = parser.add_argument_group("pictures").add_argument
    add("--out", type=Path, default=Path("runs/explain"), help="directory for the pictures")
    add("--stretch", type=whole, default=48, help="bytes on a side of the picture of the heads")
    add(
        "--queries",
        type=count,
        nargs="+",
        metavar="POSITION",
        help="bytes whose rollout is drawn (default: the last one and the middle one)",
    )
    return parser


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The one that is asked for, or the first of those that earlier runs left."""
    if args.checkpoint:
        return args.checkpoint
    known = (LEFT_BY_TRAINING, args.out / "checkpoint.pt")
    return next((path for path in known if path.exists()), None)


def find_model(args: argparse.Namespace) -> ByteModel:
    """A trained model: from a checkpoint, or trained now."""
    path = find_checkpoint(args)
    if path is None:
        return train_model(args)
    state = load_checkpoint(path)
    model = build_model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    print(f"{path}: step {state['step']}, attention {model.config.attention}")
    return model


def train_model(args: argparse.Namespace) -> ByteModel:
    """A short training run, whose checkpoint stays in --out."""
    config = Config(args.layers, args.width, args.heads, args.window)
    settings = Settings(length=args.train_length, steps=args.steps, seed=args.seed)
    print(f"There is no {LEFT_BY_TRAINING}: training a short one, {args.steps} steps", flush=True)
    trainer = Trainer(config, settings, load_corpus(args.text, settings.length))
    if not trainer.train(args.out / "checkpoint.pt"):
        raise KeyboardInterrupt
    return trainer.model


def read_text(args: argparse.Namespace) -> torch.Tensor:
    """The held-out bytes that are explained."""
    held_out = load_corpus(args.text, 1).held_out
    text = torch.from_numpy(held_out[args.start : args.start + args.length].astype("int64"))
    if len(text) < 2:
        raise DataError(
            f"expected --start below the {len(held_out) - 1} held-out bytes, got {args.start}"
        )
    return text


def explain(model: ByteModel, text: torch.Tensor, args: argparse.Namespace) -> list[Path]:
    """Draw everything; returns the files."""
    n, config = len(text), model.config
    queries = args.queries or [n - 1, n // 2]
    if max(queries) >= n:
        raise DataError(f"expected --queries below the {n} bytes of the text, got {max(queries)}")
    layers = layer_weights(model, text)
    pairs = sum(weights.col_indices.numel() for weights in layers)
    print(f"{n} bytes, {pairs} weights ({pairs / (n * n * config.layers * config.heads):.1%})")
    start = max(0, n - args.stretch)
    files = [args.out / f"{name}.png" for name in ("heads", "distances", "global", "rollout")]
    save_heads(files[0], [stretch(w, start, n) for w in layers], text[start:])
    tokens = config.global_tokens
    save_distances(files[1], [distance_profile(w, tokens) for w in layers])
    shares = torch.stack([share_of_first(w, tokens) for w in layers])
    save_shares(files[2], shares, tokens)
    save_rollout(files[3], rollout(layers, queries), queries, text)
    if tokens:
        most = divmod(int(shares.argmax()), config.heads)
        print(f"most on global bytes: layer {most[0] + 1}, head {most[1] + 1}, {shares.max():.0%}")
    return files


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = read_text(args)
        files = explain(find_model(args), text, args)
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    print(f"{args.out}: {', '.join(path.name for path in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
