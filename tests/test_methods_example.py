"""The example that compares methods: its task can be solved, every method trains, runs resume."""

import json
import sys
from functools import partial

import example_scripts
import pytest
import torch
from example_scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

from recall.data import NOTHING, Recall
from recall.measure import Settings, accuracy, build_model, losses
from recall.methods import METHODS

TINY = Settings(length=130, keys=8, width=16, heads=2, batch=2, steps=3)
OPTIONS = [word for name in ("length", "keys", "width", "heads", "batch", "steps")
           for word in (f"--{name}", str(getattr(TINY, name)))]  # fmt: skip


def test_every_question_has_its_answer_in_the_first_half():
    task = Recall(length=101, keys=9, values=5, questions=7)
    tokens, answers = task.batch(3, step=4, seed=1)
    assert tokens.shape == (3, 101, 2)
    assert answers.shape == (3, 7)
    for example, answer in zip(tokens, answers, strict=True):
        keys, values = example.unbind(-1)
        facts = keys[:50]
        assert facts.bincount(minlength=10)[1:].min() >= 50 // 9
        assert torch.all(keys[50:94] == NOTHING)
        assert torch.all(values[94:] == NOTHING)
        for key, value in zip(keys[94:], answer, strict=True):
            assert torch.all(values[:50][facts == key] == value + 1)
        assert len(set(keys[94:].tolist())) == 7


def test_batches_follow_step_and_seed():
    task = TINY.task
    first, again = task.batch(2, 0, 0), task.batch(2, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (task.batch(2, 1, 0), task.batch(2, 0, 1)):
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("size", [{"keys": 70}, {"questions": 9}])
def test_a_task_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match="questions ≤ keys"):
        Recall(**{"length": 130, "keys": 8, "questions": 8, **size})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    model = build_model(method, TINY).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    taken = [loss for loss, _ in losses(model, TINY)]
    assert len(taken) == TINY.steps
    assert all(torch.tensor(taken).isfinite())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)
    assert 0 <= accuracy(model, TINY) <= 1


def test_methods_start_from_the_same_weights_around_the_attention():
    first, second = (build_model(method, TINY) for method in ("full", "top-k"))
    assert torch.equal(first.key.weight, second.key.weight)
    assert torch.equal(first.value.weight, second.value.weight)
    assert torch.equal(first.answer.weight, second.answer.weight)


run = partial(example_scripts.run, "compare_methods.py")


def test_whole_run_and_resume(tmp_path):
    out = ("--out", str(tmp_path))
    run(*OPTIONS, *out, "--methods", "window")
    text = run(*OPTIONS, *out, "--methods", "window", "linear", "--resume")
    assert "window: " not in text  # no progress bar: it is not trained again
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"]) == {"window", "linear"}
    assert all(len(result["losses"]) == TINY.steps for result in results["methods"].values())
    assert (tmp_path / "methods.png").stat().st_size > 10000
    assert all(method in text for method in ("window", "linear"))
    text = run(*OPTIONS, *out, "--steps", "9", "--resume", status=2)
    assert "was made with" in text


def test_wrong_options_say_why(tmp_path):
    assert "questions ≤ keys" in run("--length", "20", "--out", str(tmp_path / "x"), status=2)
    assert not list(tmp_path.iterdir())


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--methods", "--steps", "--seed", "--resume"))
