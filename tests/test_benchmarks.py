"""The CPU benchmark: its cases, limits and targets, what it writes, and the comparison of two."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

pytest.importorskip("tqdm", reason="the benchmarks show their progress with it")

import derive  # noqa: E402
import targets  # noqa: E402
from limits import Limits, Probe, rates  # noqa: E402
from peers import PEERS, Setup, Unsupported, make_task  # noqa: E402
from record import DIRECTIONS, OURS, by_problem  # noqa: E402
from suites import SUITES, suite  # noqa: E402
from timing import Samples, interleave  # noqa: E402
from workload import CASES, dense_reference, find_case, make_inputs  # noqa: E402


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("length", [300, 576, 1024])
@pytest.mark.parametrize("name", CASES)
def test_pairs_of_a_case_are_those_of_its_pattern(name, length):
    case = CASES[name].at(length)
    mask = case.pattern().mask(length)
    assert int(mask.sum()) == case.pattern().cost(length).pairs
    if (padding := case.key_padding_mask()) is not None:
        assert padding.any()
        mask = mask & ~padding
    assert torch.equal(case.mask(), mask)
    assert case.pairs() == int(mask.sum())


def test_a_name_with_a_length():
    assert find_case("strided_n16384").stride == 128
    assert find_case("window256_n1024").name == "window256_n1024"
    for name in ("window257", "window256_nine", ""):
        with pytest.raises(ValueError, match="expected a case"):
            find_case(name)


WINDOWS = ("causal256", "dilated2", "window256_global16")
COMPUTED = {
    "sparse_attn": (*WINDOWS, "bigbird64", "strided", "half_padded256"),
    "bigbird": ("bigbird64",),
    "local_attention": ("causal256", "dilated2"),
    "longformer": ("window256_global16",),
    "chunked_bmm": (*WINDOWS, "bigbird64", "strided"),
    "chunk_loop": (*WINDOWS, "bigbird64"),
    "chunk_loop_tuned": (*WINDOWS, "bigbird64"),
}


@pytest.mark.parametrize("name", [*WINDOWS, "bigbird64", "strided", "half_padded256"])
@pytest.mark.parametrize("peer", COMPUTED)
def test_a_peer_computes_the_case_or_says_why_not(name, peer):
    pytest.importorskip("transformers", reason="two peers are modules of it")
    if peer == "local_attention":
        pytest.importorskip("local_attention", reason="is this peer")
    case = CASES[name].at(1024)
    inputs = make_inputs(1024, 2, torch.float32, 0, 16)
    if name not in COMPUTED[peer]:
        with pytest.raises(Unsupported, match="none: "):
            make_task(PEERS[peer], Setup(case, inputs, False))
        return
    expected = dense_reference(case.mask(), inputs)
    for backward in (False, True):
        task, _ = make_task(PEERS[peer], Setup(case, inputs, backward))
        for actual, exact in zip(task(), expected, strict=False):
            native = PEERS[peer].from_native(actual, 2)
            torch.testing.assert_close(native.double(), exact, atol=2e-5, rtol=0)


def test_limits_are_products_and_exponentials():
    found = {
        ("gemm", "float32", 1): Probe(100.0, lambda: None),
        ("gemm", "float32", 2): Probe(100.0, lambda: None),
        ("gemm", "bfloat16", 2): Probe(100.0, lambda: None),
        ("exp", "8192", 1): Probe(30.0, lambda: None),
        ("exp", "16384", 1): Probe(60.0, lambda: None),
        ("copy", "float32", 2): Probe(7.0, lambda: None),
    }
    seconds = ([4.0, 1.0, 2.0], [1.0], [0.5], [3.0], [3.0], [1.0])
    times = {name: Samples(s) for name, s in zip(found, seconds, strict=True)}
    measured = rates(found, times)
    assert Limits.of(measured, "float32", 2) == Limits(100.0, 40.0, 7.0)
    assert Limits.of(measured, "bfloat16", 2) == Limits(200.0, 40.0, 7.0)
    # A product rate that is lower than float32's is no limit: half types may be widened.
    assert Limits.of(measured | {("gemm", "bfloat16", 2): 3.0}, "bfloat16", 2).gemm == 100.0
    one = Limits.of(measured, "float32", 1)
    assert one == Limits(50.0, 20.0, 7.0)
    assert one.seconds(10, 5, backward=False) == 4 * 10 * 5 / 50 + 10 / 20
    assert one.seconds(10, 5, backward=True) == 14 * 10 * 5 / 50 + 2 * 10 / 20


def test_interleaving_prepares_each_call_and_warms_up_what_is_quick():
    calls, before = [], []
    tasks = {name: lambda name=name: calls.append(name) for name in ("quick", "slow")}
    samples = interleave(tasks, 2, 0.0, before=before.append, known={"slow": 60.0})
    assert [len(samples[name].seconds) for name in tasks] == [3, 3]
    assert [calls.count(name) for name in tasks] == [5, 3]
    assert len(before) == 1 + 6


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_ours_and_cases_that_exist(name):
    items = suite([name], 2)
    assert all(item.peers[0] == OURS and set(item.peers) <= set(PEERS) for item in items)
    assert all(set(item.memory) <= set(item.peers) for item in items)
    assert len({item.problem for item in items}) == len(items)
    assert {item.problem for item in items} <= {item.problem for item in suite(["all"], 2)}


def row(direction: str, ms: float, peer: str = OURS, **fields: object) -> dict:
    usual = {"case": "window256", "length": 4096, "head_dim": 64, "heads": 8, "threads": 2}
    found = usual | {"dtype": "float32", "peer": peer, "direction": direction} | fields
    shares = {"share_of_limit": 10 / ms, "share_of_float32_limit": 10 / ms}
    times = {"median_ms": ms, "min_ms": ms, "max_ms": ms, "limit_ms": 10.0, "pairs": 7}
    return found | times | shares


def result() -> dict:
    rows = [row(direction, ms) for direction, ms in zip(DIRECTIONS, (12.0, 20.0), strict=True)]
    rows += [row(d, ms, case="causal256") for d, ms in zip(DIRECTIONS, (7.0, 13.0), strict=True)]
    rows += [row(d, 40.0, "chunk_loop_tuned") | {"times_ours": 1.85} for d in DIRECTIONS]
    rows += [row(d, 60.0, "chunk_loop") | {"times_ours": 3.0} for d in DIRECTIONS]
    rows += [row(DIRECTIONS[0], 1.0, "longformer", case="causal256") | {"times_ours": 1.0}]
    return {"environment": {"cpu": "one"}, "results": rows}


def test_targets_say_what_was_reached():
    found = {(t["target"], t["direction"]): t for t in targets.evaluate(result()["results"])}
    share = "share of the limit, window ±256"
    assert found[share, "forward"]["measured"] == pytest.approx(100 / 1.2)
    assert found[share, "forward"]["reached"]
    assert not found[share, "forward_backward"]["reached"]
    loop = found["the best chunk loop in stock torch", "forward"]
    assert (loop["measured"], loop["reached"]) == (1.85, False)
    causal = [found["causal ÷ both sides", direction] for direction in DIRECTIONS]
    assert [c["measured"] for c in causal] == pytest.approx([7 / 12, 13 / 20])
    assert [c["reached"] for c in causal] == [True, False]
    assert not any("Longformer" in name for name, _ in found)


def test_what_is_derived():
    rows = [row("forward", 3 * n**1.5 / 1e4, length=n) for n in (1024, 4096, 16384)]
    rows += [row("forward", float(w), case=f"window{w}", length=8192) for w in (64, 128, 1024)]
    rows += [row("forward", 30.0, threads=1), row("forward", 5.0, case="causal256")]
    by_variable = {entry["variable"]: entry for entry in derive.growth(rows)}
    assert by_variable["length"]["exponent"] == pytest.approx(1.5)
    assert by_variable["reach"]["exponent"] == pytest.approx(1.0)
    assert (by_variable["reach"]["from"], by_variable["reach"]["to"]) == (64, 1024)
    two = 3 * 4096**1.5 / 1e4
    (speed_up,) = derive.speed_up(rows)
    assert speed_up["speed_up"] == pytest.approx(30 / two)
    (cost,) = derive.costs(rows)
    assert cost["ratio"] == pytest.approx(5 / two)
    assert (cost["case"], cost["of"]) == ("causal256", "window256")


def changed(factor: float) -> dict:
    """One entry of ours takes so much longer, on a machine with half the speed."""
    found = copy.deepcopy(result())
    for entry in found["results"]:
        entry["median_ms"] *= 2
        entry["limit_ms"] *= 2
    found["results"][0]["median_ms"] *= factor
    return found


def compare(tmp_path: Path, old: dict, new: dict, *options: object):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    return run("compare.py", *paths, *options)


@pytest.mark.parametrize(
    ("factor", "options", "status"),
    [
        (1.0, (), 0),
        (0.5, (), 0),
        (1.09, (), 0),
        (1.11, (), 1),
        (1.11, ("--allow", 12), 0),
        (1.11, ("--by", "chunk_loop"), 1),
    ],
)
def test_comparison_finds_what_got_slower(tmp_path, factor, options, status):
    done = compare(tmp_path, result(), changed(factor), *options)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.count("  worse") == status
    count = 2 if options and options[0] == "--by" else 4
    assert f"{count} compared, {status} more than" in done.stdout


def test_comparison_counts_what_only_one_file_has(tmp_path):
    less = changed(1.0)
    del less["results"][0]
    less["results"][0] = {k: v for k, v in less["results"][0].items() if k != "median_ms"}
    less["environment"]["cpu"] = "another"
    done = compare(tmp_path, result(), less)
    assert done.returncode == 0, done.stderr
    assert "2 compared, 0 more than" in done.stdout
    assert "only in the old file: 2, only in the new one: 0" in done.stdout
    assert "other machines: one, then another" in done.stdout


@pytest.mark.parametrize("content", [{}, [], {"results": []}, {"results": [{"case": "window256"}]}])
def test_comparison_refuses_other_files(tmp_path, content):
    done = compare(tmp_path, result(), content)
    assert done.returncode == 2
    assert "expected a result of cpu_attention.py" in done.stderr


def test_comparison_refuses_what_it_cannot_read_or_match(tmp_path):
    assert compare(tmp_path, result(), result(), "--by", "bigbird").returncode == 2
    (tmp_path / "new.json").write_text("{")
    assert run("compare.py", tmp_path / "old.json", tmp_path / "new.json").returncode == 2
    assert run("compare.py", tmp_path / "old.json", tmp_path / "none.json").returncode == 2


def test_what_a_short_run_writes(tmp_path):
    out = tmp_path / "found.json"
    peers = (OURS, "sdpa_mask", "local_attention", "chunk_loop_tuned")
    options = ["--lengths", 256, 512, 1024, "--dtypes", "bfloat16", "--heads", 1]
    options += ["--threads", 1, "--rounds", 1, "--seconds", 0.001, "--out", out]
    done = run("cpu_attention.py", "--cases", "window64", "bigbird64", *options, "--peers", *peers)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    problems = by_problem(found["results"])
    assert len(problems) == 2 * 3
    for (case, length, *_), entries in problems.items():
        assert set(entries) == set(peers)
        for direction in DIRECTIONS:
            ours = entries[OURS][direction]
            assert ours["pairs"] == find_case(case).at(length).pairs()
            assert 0 < ours["min_ms"] <= ours["median_ms"] <= ours["max_ms"]
            assert ours["share_of_limit"] == pytest.approx(ours["limit_ms"] / ours["median_ms"])
            # The better of both product rates is the limit of half types.
            assert ours["share_of_float32_limit"] >= ours["share_of_limit"]
            assert 1e-5 < ours["max_error"] < 6e-2
            other = entries["sdpa_mask"][direction]
            assert other["times_ours"] == pytest.approx(other["median_ms"] / ours["median_ms"])
    assert {entry["case"] for entry in found["growth"]} == {"window64", "bigbird64"}
    assert "window64_n512, bfloat16" in out.with_suffix(".txt").read_text()
    for kind in ("bars", "lines"):
        assert (tmp_path / f"found_{kind}.png").stat().st_size > 10000
    assert run("compare.py", out, out).returncode == 0


def test_memory_of_a_call_is_at_least_what_it_returns():
    done = run("memory.py", "--cases", "window64_n4096", "--threads", 1)
    assert done.returncode == 0, done.stderr
    forward, both = json.loads(done.stdout)
    mib = 4096 * 8 * 64 * 4 / 2**20
    assert mib * 0.95 < forward["peak_mib"] < both["peak_mib"]
    assert both["peak_mib"] > 4 * mib * 0.95
    for entry, returned in ((forward, mib), (both, 4 * mib)):
        assert entry["extra_mib"] == pytest.approx(entry["peak_mib"] - returned)
