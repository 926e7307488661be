"""One call of every implementation on a GPU: prepared, checked against float64, timed in turns."""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_attentions import (
    IMPLEMENTATIONS,
    OURS,
    OURS_ON_HOPPER,
    Implementation,
    Unsupported,
    Way,
)
from gpu_timing import interleave, kernels, peak_mib, quickest
from gpu_workload import Reference, Setup, make_inputs
from torch import Tensor


@dataclass
class Runner:
    """A way to call an implementation, with its tensors, and the graph that its output hangs on."""

    implementation: Implementation
    way: Way
    inputs: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        layout = self.implementation.layout
        *leaves, self.grad = (layout(x).detach().contiguous() for x in self.inputs)
        self.leaves = tuple(x.requires_grad_() for x in leaves)
        self.output: Tensor | None = None

    def _apply_setting(self) -> None:
        if self.implementation.setting:
            name, value = self.implementation.setting
            os.environ[name] = value

    def forward(self) -> Tensor:
        self._apply_setting()
        return self.way.run(*self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        if self.output is None:
            self.output = self.forward()
        return self.gradients(self.output, self.grad)

    def gradients(self, output: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        self._apply_setting()
        return torch.autograd.grad(output, self.leaves, grad, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def call(self, direction: str) -> Callable[[], object]:
        return self.forward if direction == "forward" else self.backward

    def error(self, direction: str, reference: Reference, exact: tuple[Tensor, ...]) -> float:
        """The largest difference from the reference; NaN if there is one in the results."""
        back, rows, output = self.implementation.layout, reference.rows, self.forward()
        inner = slice(None)
        if self.implementation.shifts_at_ends:
            left, right = reference.setup.case.window
            reach = max(left, right) * reference.setup.case.dilation
            inner = (rows >= reach) & (rows < reference.setup.length - reach)
        if direction == "forward":
            return _difference(back(output)[:, :, rows[inner]], exact[0][:, :, inner])
        grad = back(reference.grad).contiguous()
        query, key, value = map(back, self.gradients(output, grad))
        found = [_difference(query[:, :, rows[inner]], exact[1][:, :, inner])]
        if not self.implementation.shifts_at_ends:
            found += [_difference(key, exact[2]), _difference(value, exact[3])]
        return max(found, key=lambda x: math.inf if math.isnan(x) else x)


def _difference(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).abs().max().item() if ours.numel() else 0.0


class Group:
    """One call of every implementation: prepared, checked, then timed in turns."""

    def __init__(self, setup: Setup, args: argparse.Namespace, before: list[dict]):
        self.setup, self.args, self.before = setup, args, before
        self.inputs = make_inputs(setup, args.seed)
        self.reference = Reference(setup, self.inputs)
        self.exact: dict[bool, tuple[Tensor, ...]] = {}
        self.rows: list[dict] = []
        # What runs, by implementation and direction: the best way, and its error.
        self.chosen: dict[tuple[str, str], tuple[Runner, float]] = {}

    def prepare(self, name: str) -> None:
        implementation = IMPLEMENTATIONS[name]
        if implementation.dense not in self.exact:
            self.exact[implementation.dense] = self.reference.compute(implementation.dense)
        try:
            ways = implementation.prepare(self.setup)
        except Unsupported:
            return
        except Exception as error:
            for direction in self.args.directions:
                self.fail(name, direction, error)
            return
        ways = self.known(name, ways) or ways
        runners = [Runner(implementation, way, self.inputs) for way in ways]
        for direction in self.args.directions:
            self.choose(name, direction, runners)

    def known(self, name: str, ways: list[Way]) -> list[Way]:
        """The ways that won at other lengths: each of the others takes seconds to compile."""
        kind = (name, self.setup.case.name, self.setup.head_dim)
        notes = {
            row.get("note")
            for row in self.before
            if (row["implementation"], row["case"], row["head_dim"]) == kind
        }
        return [way for way in ways if way.note in notes]

    def choose(self, name: str, direction: str, runners: list[Runner]) -> None:
        """Checks every way, and keeps the quickest of those that work."""
        exact = self.exact[runners[0].implementation.dense]
        errors, last = {}, None
        for i, runner in enumerate(runners):
            try:
                errors[i] = runner.error(direction, self.reference, exact)
            except Exception as error:
                last = error
        if not errors:
            self.fail(name, direction, last)
            return
        working = list(errors)
        calls = [runners[i].call(direction) for i in working]
        best = working[quickest(calls, self.setup.device)]
        self.chosen[name, direction] = (runners[best], errors[best])

    def fail(self, name: str, direction: str, error: Exception) -> None:
        first = str(error).strip().partition("\n")[0]
        self.add(name, direction, error=f"{type(error).__name__}: {first}"[:300])

    def add(self, name: str, direction: str, **found: object) -> None:
        fields = {"implementation": name, **self.setup.fields(), "direction": direction}
        numbers = ("ms", "useful_tflops", "gb_per_s", "peak_mib", "error")
        self.rows.append({**fields, **dict.fromkeys(numbers), **found})

    def measure(self) -> list[dict]:
        """The rows of all implementations."""
        for name in self.args.implementations:
            self.prepare(name)
        device = self.setup.device
        for direction in self.args.directions:
            runners = {n: r for (n, d), (r, _) in self.chosen.items() if d == direction}
            calls = {name: runner.call(direction) for name, runner in runners.items()}
            args = self.args
            samples = interleave(calls, device, args.rounds, args.seconds, args.seed)
            for name, seconds in samples.items():
                self.add_times(name, direction, seconds)
        if device.type == "cuda":
            torch.cuda.synchronize()  # after an illegal access nothing more can be measured
        return self.rows

    def add_times(self, name: str, direction: str, seconds: list[float]) -> None:
        runner, error = self.chosen[name, direction]
        median, device = statistics.median(seconds), self.setup.device
        whole = runner.forward if direction == "forward" else runner.both
        found = {
            "ms": 1e3 * median,
            "useful_tflops": self.setup.flops(direction) / median / 1e12,
            "gb_per_s": self.setup.bytes(direction) / median / 1e9,
            "peak_mib": peak_mib(whole, device),
            "error": error if math.isfinite(error) else str(error),
            "min_ms": 1e3 * min(seconds),
            "max_ms": 1e3 * max(seconds),
        }
        if name in (OURS, OURS_ON_HOPPER):
            on_gpu = device.type == "cuda"
            names = kernels(runner.call(direction)) if on_gpu else [device.type]
            found["path"] = " ".join(names) or "unknown"
        if runner.way.note:
            found["note"] = runner.way.note
        self.add(name, direction, **found)
