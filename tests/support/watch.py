"""Watch the loads and stores of kernels in Triton's interpreter, which itself finds neither wrong addresses nor races.

    with watched() as problems:
        pair_loss._launch(...)
    assert not problems

The interpreter runs the programs of a launch one after the other, and all lanes of a program in step. A GPU does not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.support.oracle import Array


class Access(NamedTuple):
    """The loads or the stores of one instruction in one program."""

    program: int
    segment: int  # the number of barriers that the program has passed
    after_atomic: bool  # not checked between programs: in these kernels only the last program goes on after its atomic
    is_store: bool
    addresses: Array  # [lanes that are active], in bytes
    size: int  # bytes
    lanes: Array  # [lanes that are active]


class Launch:
    """The accesses of a launch, as they happen."""

    def __init__(self, name: str, arguments: Any) -> None:
        self.name = name
        self.elements = {size: np.array(sorted(addresses)) for size, addresses in element_addresses(arguments).items()}
        self.accesses: list[Access] = []
        self.out_of_bounds = 0
        self.program, self.segment, self.after_atomic = -1, 0, False

    def start_program(self) -> None:
        self.program, self.segment, self.after_atomic = self.program + 1, 0, False

    def record(self, is_store: bool, pointers: Any, mask: Any) -> None:
        """Record the active lanes of a load or a store."""
        addresses, active = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        lanes = np.flatnonzero(active)
        addresses, size = addresses.ravel()[lanes], pointers.get_element_ty().primitive_bitwidth // 8
        self.out_of_bounds += int((~np.isin(addresses, self.elements.get(size, ()))).sum())
        self.accesses.append(Access(self.program, self.segment, self.after_atomic, is_store, addresses, size, lanes))

    def problems(self) -> list[str]:
        """Return one sentence for each kind of problem."""
        found = []
        if self.out_of_bounds:
            found.append(f"{self.name}: {self.out_of_bounds} lanes access no element of an argument")
        if self.programs_race():
            found.append(f"{self.name}: a program stores what another one accesses")
        if self.lanes_race():
            found.append(f"{self.name}: a lane stores what another one loads, without a barrier between them")
        return found

    def programs_race(self) -> bool:
        """Return whether a program stores to an address that another one accesses before it counts itself as done."""
        programs: dict[tuple[int, bool], set[int]] = {}
        for access in self.accesses:
            if not access.after_atomic:
                for address in access.addresses.tolist():
                    programs.setdefault((address, access.is_store), set()).add(access.program)
        stores = [(address, by) for (address, is_store), by in programs.items() if is_store]
        return any(len(by | programs.get((address, False), set())) > 1 for address, by in stores)

    def lanes_race(self) -> bool:
        """Return whether a lane stores a byte that another one loads, in one program and between two barriers."""
        lanes: dict[tuple[int, int, int, bool], set[int]] = {}
        for access in self.accesses:
            for address, lane in zip(access.addresses.tolist(), access.lanes.tolist()):
                for byte in range(address, address + access.size):
                    lanes.setdefault((access.program, access.segment, byte, access.is_store), set()).add(lane)
        stores = [(key, by) for key, by in lanes.items() if key[-1]]
        loads = {key[:-1]: by for key, by in lanes.items() if not key[-1]}
        return any(key[:-1] in loads and len(by | loads[key[:-1]]) > 1 for key, by in stores)


@contextmanager
def watched(count_barriers: bool = True) -> Iterator[list[str]]:
    """Yield a list that fills with the problems of all launches in the context.

    With `count_barriers=False`, the kernels are judged as if they had no barriers.
    """
    problems: list[str] = []
    launch: list[Launch] = []
    builder, run = InterpreterBuilder, GridExecutor.__call__
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    set_grid_idx, barrier = builder.set_grid_idx, builder.create_barrier

    def watched_run(self: Any, *arguments: Any, **options: Any) -> Any:
        launch[:] = [Launch(self.fn.__name__, arguments)]
        result = run(self, *arguments, **options)
        problems.extend(launch[0].problems())
        return result

    def watched_load(self: Any, pointers: Any, mask: Any, *arguments: Any) -> Any:
        launch[0].record(False, pointers, mask)
        return load(self, pointers, mask, *arguments)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        launch[0].record(True, pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    def watched_atomic(self: Any, *arguments: Any) -> Any:
        launch[0].after_atomic = True
        return atomic(self, *arguments)

    def watched_grid_idx(self: Any, *index: int) -> Any:
        launch[0].start_program()
        return set_grid_idx(self, *index)

    def watched_barrier(self: Any) -> Any:
        launch[0].segment += count_barriers
        return barrier(self)

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", watched_run))
        for name, function in {
            "create_masked_load": watched_load,
            "create_masked_store": watched_store,
            "create_atomic_rmw": watched_atomic,
            "set_grid_idx": watched_grid_idx,
            "create_barrier": watched_barrier,
        }.items():
            stack.enter_context(patch.object(builder, name, function))
        yield problems


def element_addresses(arguments: Any) -> dict[int, set[int]]:
    """Return the addresses of all elements of the tensors in nested tuples, by the size of an element in bytes."""
    addresses: dict[int, set[int]] = {}
    for argument in arguments if isinstance(arguments, tuple) else (arguments,):
        if isinstance(argument, tuple):
            for size, more in element_addresses(argument).items():
                addresses.setdefault(size, set()).update(more)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            offsets = np.zeros(1, np.int64)
            for length, stride in zip(argument.shape, argument.stride()):
                offsets = (offsets[:, None] + np.arange(length) * stride).ravel()
            size = argument.element_size()
            addresses.setdefault(size, set()).update((argument.data_ptr() + offsets * size).tolist())
    return addresses
