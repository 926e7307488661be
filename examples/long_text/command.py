"""What the training scripts share: types of options, and starting or resuming a run."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from long_text.training import Trainer, load_checkpoint


def positive(kind: type):
    """An argparse type: a finite number above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above zero, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def count(text: str) -> int:
    """An argparse type: an int that is zero or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected zero or more, got {text}")
    return value


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def pick(kind: type, args: argparse.Namespace, stored: dict | None = None):
    """An instance of `kind` from the options, or from a checkpoint that they must not deny."""
    given = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    if stored is None:
        return kind(**given)
    for name, value in given.items():
        if value not in (getattr(kind(), name), stored[name]):
            option = name.replace("_", "-")
            raise ValueError(
                f"the checkpoint was made with --{option} {stored[name]}, not {value}: "
                f"leave --{option} out, or start anew in another --out"
            )
    return kind(**stored)


def checkpoint_path(args: argparse.Namespace) -> Path:
    """The file that a run writes and `--resume` reads."""
    return args.out / "checkpoint.pt"


def prepare(
    args: argparse.Namespace, kind: type[Trainer], load: Callable, keep_old: bool = True
) -> Trainer:
    """The trainer that the options ask for, new or resumed.

    `load(config, settings)` gives the data. The checkpoint of an earlier run in the same folder is
    renamed, unless `keep_old` is False because nothing will be written.
    """
    path = checkpoint_path(args)
    state = load_checkpoint(path) if args.resume else None
    config = pick(kind.Config, args, state and state["config"])
    settings = pick(kind.Settings, args, state and state["settings"])
    corpus = load(config, settings)
    if state and state["data"] != corpus.fingerprint:
        raise ValueError(f"the checkpoint was trained on other data than {corpus.name}")
    trainer = kind(config, settings, corpus)
    if state:
        trainer.restore(state)
        print(f"Resuming at step {trainer.step} of {settings.steps}")
    elif path.exists() and keep_old:
        path.replace(args.out / "previous.pt")
        print(f"Starting anew; the checkpoint of the run before is now {args.out}/previous.pt")
    return trainer
