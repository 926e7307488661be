"""Rows that travel between ranks, point to point, under way while something else is computed.

An exchange is two autograd functions: one sends, the other waits for what comes. Backward the other
sends the gradients of what came, and the first waits for those of what it sent. A token runs
through all exchanges of a call, so that every rank passes them in one order, forward and backward,
also those in which it has no part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn.distributed.routes import Route

#: Messages of one direction have tags of their own: an exchange has at most so many tensors.
_TENSORS = 4


@dataclass
class Traffic:
    """Bytes that this rank handed to torch.distributed for other ranks (see `count_traffic`)."""

    forward: int = 0
    backward: int = 0


_counting: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what `context_parallel_attention` sends from this rank, gradients included.

    Yields:
        A `Traffic`: bytes of rows and of masks, `forward` and `backward`. The few bytes by which
        ranks compare their calls are not in it.

    >>> with count_traffic() as traffic:
    ...     pass
    >>> traffic
    Traffic(forward=0, backward=0)
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


class Exchange:
    """One exchange of a call: its rows, and the messages that are under way."""

    def __init__(self, route: Route, group: dist.ProcessGroup, number: int) -> None:
        self.route, self.group = route, group
        self.needed: tuple[bool, ...] = ()  # which tensors' gradients are wanted
        self._tag = 2 * number * _TENSORS
        self._under_way: tuple[Any, ...] = ()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Sends rows of (batch, heads, rows, size) tensors, and makes room for what comes."""
        route = self.route
        outgoing = [[_rows(t, rows) for t in tensors] for rows in route.sent]
        incoming = [[_room(t, len(rows)) for t in tensors] for rows in route.received]
        self._launch(outgoing, incoming, self._tag)
        self._count(outgoing, "forward")

    def receive(self) -> list[Tensor]:
        """Waits; the tensors of what came, each row where the route says."""
        incoming = self._wait()
        columns = zip(*incoming, strict=True)
        return [_assembled(parts, self.route) for parts in columns]

    def send_back(self, gradients: Sequence[Tensor]) -> None:
        """Sends the gradients of what came to where it came from."""
        route = self.route
        outgoing = [[_rows(g, rows) for g in gradients] for rows in route.received]
        incoming = [[_room(g, len(rows)) for g in gradients] for rows in route.sent]
        self._launch(outgoing, incoming, self._tag + _TENSORS)
        self._count(outgoing, "backward")

    def receive_back(self, lengths: Sequence[int]) -> list[Tensor]:
        """Waits; the gradients of what was sent, added up in the order of the ranks, half types in
        float32.
        """
        incoming = self._wait()
        sums = []
        for parts, length in zip(zip(*incoming, strict=True), lengths, strict=True):
            dtype = parts[0].dtype
            wide = torch.promote_types(dtype, torch.float32)
            total = _room(parts[0], length).zero_().to(wide)
            for rows, part in zip(self.route.sent, parts, strict=True):
                total.index_add_(2, rows, part.to(wide))
            sums.append(total.to(dtype))
        return sums

    def settle(self) -> None:
        """Lets the messages that are under way arrive: dropped, they would take the group along."""
        if self._under_way:
            self._wait()

    def _launch(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]], tag: int) -> None:
        operations, names = [], []
        for rank in range(dist.get_world_size(self.group)):
            for kind, parts in ((dist.isend, outgoing[rank]), (dist.irecv, incoming[rank])):
                for i, part in enumerate(parts):
                    if part.numel() == 0:
                        continue
                    whole = {"group": self.group, "tag": tag + i, "group_peer": rank}
                    operations.append(dist.P2POp(kind, part, **whole))
                    names.append(self._name(rank, kind is dist.isend, tag))
        with named_error(f"messages with {self.route.what}"):
            works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) != len(names):  # a backend may join them
            names = ["; ".join(sorted(set(names)))] * len(works)
        self._under_way = (works, names, outgoing, incoming)

    def _wait(self) -> list[list[Tensor]]:
        works, names, _, incoming = self._under_way
        for work, name in zip(works, names, strict=True):
            with named_error(name):
                work.wait()
        self._under_way = ()
        return incoming

    def _name(self, rank: int, sends: bool, tag: int) -> str:
        backward = tag != self._tag
        goes_out = sends != backward  # gradients go the way back
        of = self.route.named(rank, goes_out=goes_out)
        return f"gradients of {of}" if backward else of

    def _count(self, outgoing: list[list[Tensor]], direction: str) -> None:
        count(sum(x.numel() * x.element_size() for parts in outgoing for x in parts), direction)


def count(sent: int, direction: str) -> None:
    """Adds bytes to what is being counted of a direction, "forward" or "backward"."""
    for traffic in _counting:
        setattr(traffic, direction, getattr(traffic, direction) + sent)


@contextlib.contextmanager
def named_error(what: str) -> Iterator[None]:
    """Adds to an error of torch.distributed what was being exchanged."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"sparse_attn: expected {what}, got an error of torch.distributed: {error}"
        ) from error


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(2, rows).contiguous()


def _room(like: Tensor, rows: int) -> Tensor:
    batch, heads, _, size = like.shape
    return like.new_empty(batch, heads, rows, size)


def _assembled(parts: Sequence[Tensor], route: Route) -> Tensor:
    total = _room(parts[0], route.length)
    if sum(len(rows) for rows in route.received) < route.length:
        total.zero_()
    for rows, part in zip(route.received, parts, strict=True):
        total.index_copy_(2, rows, part)
    return total


def _check_once() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "sparse_attn: expected context_parallel_attention to be differentiated once, got "
            "create_graph=True"
        )


class _Begin(torch.autograd.Function):
    """The token of a call, which needs a gradient if one of its tensors does."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.zeros((), device=tensors[0].device)  # autograd has a queue for each device

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Send(torch.autograd.Function):
    """Sends rows; returns an empty tensor for each, by which the graph goes on to `_Receive`."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: Tensor, *tensors: Tensor):
        ctx.exchange = exchange
        exchange.needed = ctx.needs_input_grad[2:]
        ctx.lengths = [tensor.shape[2] for tensor in tensors]
        exchange.send(tensors)
        return token.clone(), *(tensor.new_empty(0) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, *links: Tensor):
        _check_once()
        needed = ctx.exchange.needed
        lengths = [n for n, need in zip(ctx.lengths, needed, strict=True) if need]
        sums = iter(ctx.exchange.receive_back(lengths) if lengths else [])
        return None, grad_token, *(next(sums) if need else None for need in needed)


class _Receive(torch.autograd.Function):
    """Waits for the rows that `_Send` made room for."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: Tensor, *links: Tensor):
        ctx.exchange = exchange
        return token.clone(), *exchange.receive()

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, *gradients: Tensor):
        _check_once()
        needed = ctx.exchange.needed
        wanted = [g for g, need in zip(gradients, needed, strict=True) if need]
        if wanted:
            ctx.exchange.send_back(wanted)
        empty = (
            g.new_zeros(0) if need else None for g, need in zip(gradients, needed, strict=True)
        )
        return None, grad_token, *empty


class _End(torch.autograd.Function):
    """Hangs the token on the results, so that backward passes all exchanges on every rank. So does
    activation checkpointing, which stops a recomputation where the last tensor was saved.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, *results: Tensor):
        ctx.save_for_backward(token)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (token,) = ctx.saved_tensors
        return torch.zeros_like(token), *gradients


class Chain:
    """The exchanges of one call, in the order in which all ranks make them."""

    def __init__(self, group: dist.ProcessGroup, *tensors: Tensor) -> None:
        self._group, self._count = group, 0
        self._exchanges: list[Exchange] = []
        self._token = _Begin.apply(*tensors)

    def send(self, route: Route, *tensors: Tensor) -> tuple[Exchange, tuple[Tensor, ...]]:
        """Starts an exchange; `receive` ends it."""
        exchange = self.watch(Exchange(route, self._group, self._count))
        self._count += 1
        self._token, *links = _Send.apply(exchange, self._token, *tensors)
        return exchange, tuple(links)

    def receive(self, under_way: tuple[Exchange, tuple[Tensor, ...]]) -> list[Tensor]:
        """What came: a tensor for each that was sent."""
        exchange, links = under_way
        self._token, *received = _Receive.apply(exchange, self._token, *links)
        return received

    def watch(self, exchange: Exchange) -> Exchange:
        """Has `settle` take care of an exchange, too."""
        self._exchanges.append(exchange)
        return exchange

    def settle(self) -> None:
        """After an error of our own: what was sent arrives, so that the group stays of use."""
        for exchange in self._exchanges:
            exchange.settle()

    def end(self, *results: Tensor) -> tuple[Tensor, ...]:
        """The results of the call."""
        return _End.apply(self._token, *results)
