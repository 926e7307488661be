"""The op that lists the keys of groups."""

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from sparse_attn._library import ops

OP = ops.shared_keys.default


def groups_of(generator, sets, groups, tokens, places):
    members = torch.randint(tokens, (*sets, places), generator=generator)
    cuts = torch.randint(places + 1, (*sets, groups + 1), generator=generator)
    return members.to(DEVICE), cuts.sort(-1).values.to(DEVICE)


def by_definition(groups, n_q, n_k, padding, is_causal):
    """A list of keys for each set and query."""
    lists = []
    query_members, query_offsets, key_members, key_offsets = (x.cpu().tolist() for x in groups)
    for b, heads in enumerate(query_members):
        for h, members in enumerate(heads):
            seen = [set() for _ in range(n_q)]
            bounds, key_bounds = query_offsets[b][h], key_offsets[b][h]
            for g in range(len(bounds) - 1):
                keys = key_members[b][h][key_bounds[g] : key_bounds[g + 1]]
                for query in members[bounds[g] : bounds[g + 1]]:
                    seen[query].update(
                        k
                        for k in keys
                        if not (is_causal and k > query + n_k - n_q)
                        and not (padding is not None and padding[b, k])
                    )
            lists += [sorted(keys) for keys in seen]
    return lists


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_lists(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    sets = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    n_q, n_k = (data.draw(st.sampled_from([1, 7, 300, 700])) for _ in range(2))
    count = data.draw(st.integers(0, 5))
    queries = groups_of(generator, sets, count, n_q, data.draw(st.integers(0, 40)))
    keys = groups_of(generator, sets, count, n_k, data.draw(st.integers(0, 40)))
    padding = None
    if data.draw(st.booleans()):
        padding = (torch.rand(sets[0], n_k, generator=generator) < 0.3).to(DEVICE)
    options = {"key_padding_mask": padding, "is_causal": data.draw(st.booleans())}
    indices, counts = OP(*queries, *keys, n_q, n_k, **options)
    expected = by_definition((*queries, *keys), n_q, n_k, padding, options["is_causal"])
    longest = max(map(len, expected))
    assert indices.shape == (*sets, n_q, longest)
    assert indices.dtype == counts.dtype == torch.int32
    assert counts.flatten().tolist() == [len(keys) for keys in expected]
    rows = zip(indices.flatten(0, 2).tolist(), expected, strict=True)
    assert all(row == keys + [0] * (longest - len(keys)) for row, keys in rows)


def example():
    members = torch.tensor([[[0, 2, 1, 2]]], device=DEVICE)
    offsets = torch.tensor([[[0, 2, 4]]], device=DEVICE)
    return [members, offsets, members.clone(), offsets.clone()]


def test_opcheck():
    padding = torch.tensor([[False, True, False]], device=DEVICE)
    opcheck(OP, (*example(), 3, 3), {"is_causal": True, "key_padding_mask": padding})
    opcheck(OP, (*example(), 3, 3))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, [[[0, 3, 1, 2]]], r"query_members in \[0, 3\), got 3"),
        (2, [[[0, -1, 1, 2]]], r"key_members in \[0, 3\), got -1"),
        (1, [[[0, 3, 2]]], "query_offsets that ascend"),
        (3, [[[0, 2, 5]]], "key_offsets that ascend"),
        (3, [[[-1, 2, 4]]], "key_offsets that ascend"),
        (3, [[[0, 4]]], "as many groups"),
        (0, [[0, 1]], "query_members of shape"),
    ],
)
def test_wrong_groups(place, wrong, message):
    arguments = example()
    arguments[place] = torch.tensor(wrong, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        OP(*arguments, 3, 3)


def test_wrong_types():
    members, *rest = example()
    with pytest.raises(TypeError, match=r"query_members.*int64"):
        OP(members.int(), *rest, 3, 3)
    with pytest.raises(TypeError, match="key_padding_mask of dtype bool"):
        OP(members, *rest, 3, 3, key_padding_mask=torch.zeros(1, 3, device=DEVICE))
    with pytest.raises(ValueError, match="key_padding_mask of shape"):
        OP(members, *rest, 3, 3, key_padding_mask=torch.zeros(1, 2, device=DEVICE).bool())
    with pytest.raises(ValueError, match="n_q and n_k of at least 0"):
        OP(members, *rest, 3, -1)
