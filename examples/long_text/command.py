"""What the training scripts share: options, starting or resuming a run, and its end."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from long_text.data import DataError
from long_text.measure import peak_memory
from long_text.training import Trainer, load_checkpoint, set_threads


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


def add_size_options(add: Callable, config) -> None:
    """The size of the model."""
    whole = positive(int)
    add("--layers", type=whole, default=config.layers, help="blocks")
    add("--width", type=whole, default=config.width, help="channels of the stream")
    add("--heads", type=whole, default=config.heads, help="attention heads")


def add_training_options(parser: argparse.ArgumentParser, settings, steps: str = "") -> None:
    """How it is trained; `steps` says what the default of --steps is, if it is no number."""
    whole = positive(int)
    add = parser.add_argument_group("training").add_argument
    default = None if steps else settings.steps
    add("--steps", type=whole, default=default, help=f"updates{steps}")
    add("--minutes", type=positive(float),
        help="as many updates as fit into about so many minutes, instead of --steps")  # fmt: skip
    add("--learning-rate", type=positive(float), default=settings.learning_rate, help="at its top")
    add("--seed", type=count, default=settings.seed, help="of all that is random (default: 0)")
    add("--threads", type=whole, help="CPU threads instead of torch's choice")


def add_result_options(parser: argparse.ArgumentParser, out: str) -> Callable:
    """Where the results go; returns what adds more options to this group."""
    add = parser.add_argument_group("result").add_argument
    add("--out", type=Path, default=Path(out), help="directory for all results")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--check", action="store_true", help="exit with 1 if the model does not beat the baseline")
    return add


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
    if keep_old:
        args.out.mkdir(parents=True, exist_ok=True)
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


def train_and_report(
    trainer: Trainer,
    args: argparse.Namespace,
    describe: Callable,
    report: Callable,
    data: str,
    baseline: str,
) -> int:
    """Train and report; returns the exit status.

    `describe(trainer)` says what is about to be trained; `report(trainer, args)` returns whether it
    beat the baseline, which `baseline` names; `data` is the option that the data come from.
    """
    describe(trainer)
    if not trainer.train(checkpoint_path(args)):
        given = getattr(args, data)
        own = f" --{data} {given}" if given else ""
        print(f"Stopped at step {trainer.step}. To go on: --resume --out {args.out}{own}")
        return 130
    if report(trainer, args):
        return 0
    print(f"The model did not beat {baseline}: train it longer (--steps).")
    return 1 if args.check else 0


def summarize(
    trainer: Trainer, args: argparse.Namespace, what: str, bits: float, name: str, baseline: float
) -> None:
    """Print and keep what came out: mean bits of the held-out `what`; `baseline`, called `name`."""
    history, unit = trainer.history, trainer.unit
    history.held_out.append((trainer.step, bits))
    speed = len(history.train) * trainer.settings.batch * trainer.length / history.seconds
    width = max(len(name), len("this model"))
    print(
        f"\nheld-out {what}:\n"
        f"  {'this model':<{width}}  {bits:.3f} bits/{unit}\n"
        f"  {name:<{width}}  {baseline:.3f} bits/{unit}\n"
        f"{trainer.step} steps in {history.seconds:.0f} s, {speed / 1e3:.1f} k{unit}s/s, "
        f"peak memory {peak_memory() / 2**20:.0f} MiB"
    )
    results = {
        "held_out_bits": float(bits),
        "baseline_bits": float(baseline),
        "seconds": history.seconds,
        f"{unit}s_per_second": speed,
        "peak_memory": peak_memory(),
        "config": asdict(trainer.model.config),
        "settings": asdict(trainer.settings),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def measure_apart(script: str, what: str) -> dict | int:
    """What `script --measure what`, with the options of this process, prints last, as JSON; its
    exit status if it fails. In a process of its own, peak memory is its own."""
    command = [sys.executable, script, *sys.argv[1:], "--measure", what]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return child.returncode or json.loads(child.stdout.splitlines()[-1])


def start_and_run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    start: Callable[[], Callable[[], int]],
) -> int:
    """The job that `start()` makes, run; wrong input and Ctrl-C end without a traceback."""
    if args.threads:
        set_threads(args.threads)
    try:
        job = start()
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        return job()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def train_main(
    parser: argparse.ArgumentParser,
    kind: type[Trainer],
    load: Callable,
    describe: Callable,
    report: Callable,
    data: str,
    baseline: str,
) -> int:
    """The command line of a script that trains one model; `load(given, config)` gives the data,
    where `given` is the value of the option --`data`."""
    args = parser.parse_args()

    def start() -> Callable[[], int]:
        given = getattr(args, data)
        trainer = prepare(args, kind, lambda config, settings: load(given, config))
        return partial(train_and_report, trainer, args, describe, report, data, baseline)

    return start_and_run(parser, args, start)
