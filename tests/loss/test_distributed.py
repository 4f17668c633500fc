"""Data parallelism: several real processes must compute what one process computes from the pairs of all of them."""

import copy
import io
import time
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from amapo_loss import AdaptiveMargin, AMaPOLoss, ScoreStatistics, ScoreWindow, Totals, amapo_loss
from tests.support.generators import random_logps
from tests.support.ranks import on_ranks

Pairs = list[Tensor]  # chosen and rejected log-probs, [n] each
PAIRS_PER_RANK = {  # number of pairs on each of four ranks; with fewer ranks, the first entries
    "uneven": (5, 1, 17, 64),
    "one rank empty": (5, 0, 17, 1),
    "one pair each": (1, 1, 1, 1),
    "none": (0, 0, 0, 0),
}
SUPPLIED = ScoreStatistics(torch.tensor(0.4), torch.tensor(1.2), torch.tensor(99))


def standardized(scores: Tensor, statistics: ScoreStatistics) -> Tensor:
    """Return margins that need the statistics of all ranks."""
    return (scores - statistics.mean) / statistics.std.clamp(min=1e-3)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "released": {"margin": AdaptiveMargin("released"), "label_smoothing": 0.1},
    "supplied": {"statistics": SUPPLIED},
    "supplied, sum": {"statistics": SUPPLIED, "reduction": "sum"},
    "triton": {"backend": "triton"},
    "triton, sum": {"backend": "triton", "reduction": "sum"},
    "triton, supplied": {"backend": "triton", "statistics": SUPPLIED},
    "triton, supplied, none": {"backend": "triton", "statistics": SUPPLIED, "reduction": "none"},
    "number": {"margin": 0.4},
    "function": {"margin": standardized},
    "triton, function": {"margin": standardized, "backend": "triton"},
    "beta": {"beta": torch.tensor(0.7)},
    "weights": {},
    "triton, weights": {"backend": "triton"},
    "given margins": {},
}
# Options that have one entry per pair, as functions of the number of pairs of all ranks.
OPTIONS_PER_PAIR: dict[str, dict[str, Any]] = {
    "weights": {"weights": lambda n: torch.arange(n) % 4 / 3},
    "triton, weights": {"weights": lambda n: torch.arange(n) % 4 / 3},
    "given margins": {"margin": lambda n: torch.arange(n) % 5 / 4},
}
CASES = [(split, option) for split in PAIRS_PER_RANK for option in OPTIONS]

# Kinds of batches on which rounding errors would be visible, and the options that show them.
EQUAL_SCORES, LARGE_MEAN = "equal scores", "a mean far larger than the standard deviation"
# What counts as rounding error depends on the largest numbers of all ranks. Here, those are on rank 0.
LARGE_INPUTS, LARGE_SCORE = "scores equal up to the rounding of rank 0", "a score at the mean, and a large one"
PAIRS_PER_RANK_ROUNDING = (32, 7, 0, 61)
OPTIONS_ROUNDING: dict[str, Any] = {"beta": 1.0, "margin": AdaptiveMargin(scaling="linear")}


def pairs_of_all_ranks(n: int, kind: str = "") -> Pairs:
    chosen, rejected = (x.detach() for x in random_logps(n))
    if kind == EQUAL_SCORES:
        chosen = rejected + 0.3
    elif kind == LARGE_MEAN:
        chosen, rejected = 50 + 0.01 * chosen, torch.zeros(n)
    elif kind == LARGE_INPUTS:
        rejected = torch.where(torch.arange(n) < PAIRS_PER_RANK_ROUNDING[0], -1700.0, -120.0)
        chosen = rejected + torch.arange(n) % 5 / 4096
    elif kind == LARGE_SCORE:
        chosen, rejected = chosen - rejected, torch.zeros(n)
        chosen[0] = 300
        chosen[-1] = chosen[:-1].double().mean() - 2e-5
    return [chosen, rejected]


def pairs_of_rank(pairs: Pairs, sizes: tuple[int, ...], rank: int) -> Pairs:
    """Return the pairs of one rank, if rank k has `sizes[k]` pairs."""
    return [x.split(list(sizes))[rank].clone() for x in pairs]


def loss_outputs(pairs: Pairs, **options: Any) -> dict[str, Any]:
    """Return everything that the loss computes, as tensors that can be sent to another process."""
    inputs = [x.requires_grad_() for x in pairs]
    loss, diagnostics = amapo_loss(*inputs, **options)
    return {
        "loss": loss.detach(),
        "gradient": torch.stack(torch.autograd.grad(loss.sum(), inputs)),
        "margins": diagnostics.margins,
        "statistics": diagnostics.statistics,
        "summary": diagnostics.summary(),
    }


def compute_all_cases(rank: int, group: dist.ProcessGroup) -> dict[Any, Any]:
    """Return the outputs of this rank for all cases. One start of the processes serves all of them."""
    world = dist.get_world_size(group)
    results: dict[Any, Any] = {}
    for split, option in CASES:
        sizes = PAIRS_PER_RANK[split][:world]
        pairs = pairs_of_rank(pairs_of_all_ranks(sum(sizes)), sizes, rank)
        per_pair = {
            name: values(sum(sizes)).split(sizes)[rank] for name, values in OPTIONS_PER_PAIR.get(option, {}).items()
        }
        results[split, option] = loss_outputs(pairs, process_group=group, **OPTIONS[option] | per_pair)
    for kind in (EQUAL_SCORES, LARGE_MEAN, LARGE_INPUTS, LARGE_SCORE):
        for backend in ("torch", "triton"):
            sizes = PAIRS_PER_RANK_ROUNDING[:world]
            pairs = pairs_of_rank(pairs_of_all_ranks(sum(sizes), kind), sizes, rank)
            results[kind, backend] = loss_outputs(pairs, process_group=group, backend=backend, **OPTIONS_ROUNDING)
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_ranks_compute_what_one_process_computes(world: int) -> None:
    results = on_ranks(world, compute_all_cases)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    for split, option in CASES:
        sizes, options = PAIRS_PER_RANK[split][:world], OPTIONS[option]
        ranks = [result[split, option] for result in results]
        per_pair = {name: values(sum(sizes)) for name, values in OPTIONS_PER_PAIR.get(option, {}).items()}
        expected = loss_outputs(pairs_of_all_ranks(sum(sizes)), **options | per_pair | {"backend": "torch"})
        for other in ranks[1:]:  # all ranks have bitwise the same statistics
            assert all(map(torch.equal, ranks[0]["statistics"], other["statistics"]))
        torch.testing.assert_close(
            [x.double() for x in ranks[0]["statistics"]],
            [x.double() for x in expected["statistics"]],
            rtol=1e-6,
            atol=1e-7,
        )
        torch.testing.assert_close(torch.cat([x["margins"] for x in ranks]), expected["margins"], **tolerance)
        losses = torch.cat([x["loss"].view(-1) for x in ranks])
        gradient = torch.cat([x["gradient"] for x in ranks], dim=1)
        if options.get("reduction") == "none":
            torch.testing.assert_close(losses, expected["loss"], **tolerance)
        elif options.get("reduction") == "sum":
            torch.testing.assert_close(losses.sum(), expected["loss"], **tolerance)
        else:  # DDP averages the gradients over the ranks, and this average must be right
            torch.testing.assert_close(losses.mean(), expected["loss"], **tolerance)
            gradient = gradient / world
        torch.testing.assert_close(gradient, expected["gradient"], **tolerance)

    for backend in ("torch", "triton"):
        assert not any(result[EQUAL_SCORES, backend]["margins"].any() for result in results)
        pairs = [x.double() for x in pairs_of_all_ranks(sum(PAIRS_PER_RANK_ROUNDING[:world]), LARGE_MEAN)]
        exact = loss_outputs(pairs, **OPTIONS_ROUNDING)
        margins = torch.cat([result[LARGE_MEAN, backend]["margins"] for result in results])
        # In float32, scores this close to the mean count as equal to it, and their margin is 0.
        at_gate = ((pairs[0] - pairs[1]) - exact["statistics"].mean).abs() < 1e-4
        torch.testing.assert_close(margins.double()[~at_gate], exact["margins"][~at_gate], rtol=1e-5, atol=0)
        for kind in (LARGE_INPUTS, LARGE_SCORE):
            pairs = pairs_of_all_ranks(sum(PAIRS_PER_RANK_ROUNDING[:world]), kind)
            margins = torch.cat([result[kind, backend]["margins"] for result in results])
            assert margins[-1] == 0, "otherwise the next line shows nothing"
            torch.testing.assert_close(margins, loss_outputs(pairs, **OPTIONS_ROUNDING)["margins"], **tolerance)


def compare_compiled_with_eager(rank: int, group: dist.ProcessGroup) -> None:
    sizes = (5, 3)
    for backend in ("torch", "triton"):
        options: dict[str, Any] = {"process_group": group, "backend": backend}
        expected = loss_outputs(pairs_of_rank(pairs_of_all_ranks(8), sizes, rank), **options)
        inputs = [x.requires_grad_() for x in pairs_of_rank(pairs_of_all_ranks(8), sizes, rank)]
        torch.compiler.reset()
        loss = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")(*inputs, **options).loss
        torch.testing.assert_close(loss.detach(), expected["loss"])
        torch.testing.assert_close(torch.stack(torch.autograd.grad(loss, inputs)), expected["gradient"])


def test_the_collective_compiles_into_the_same_graph() -> None:
    on_ranks(2, compare_compiled_with_eager)


def call_the_loss_on_rank_0_only(rank: int, group: dist.ProcessGroup) -> None:
    """A collective in the loss would wait for rank 1 until the timeout, and then raise."""
    if rank == 0:
        for statistics in (None, ScoreWindow(8), ScoreStatistics.of):
            amapo_loss(*random_logps(4), statistics=statistics)
        # Here, nothing of the other ranks is needed.
        for backend in ("torch", "triton"):
            amapo_loss(*random_logps(4), statistics=SUPPLIED, reduction="sum", process_group=group, backend=backend)


def test_there_is_no_collective_without_a_group_or_need() -> None:
    on_ranks(2, call_the_loss_on_rank_0_only, timeout=20)


def update_a_window(rank: int, group: dist.ProcessGroup) -> list[Any]:
    """Return the statistics, the state of the window and the scores of all ranks after each step."""
    window = ScoreWindow(12)
    states = []
    for step, sizes in enumerate(((3, 0), (1, 4), (0, 0), (20, 2), (2, 2), (5, 6))):
        scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step))
        if step == 1:
            scores[0] = float("nan")
        scores.requires_grad_()  # a window stores only scores that a gradient is wanted for
        statistics = window(scores.split(sizes)[rank], group)
        states.append((statistics, {name: value.clone() for name, value in window.state_dict().items()}, scores))
    return states


def test_a_window_is_the_same_on_all_ranks_and_in_one_process() -> None:
    first, second = on_ranks(2, update_a_window)
    window = ScoreWindow(12)
    for (statistics, state, scores), (other_statistics, other_state, _) in zip(first, second):
        expected = window(scores)
        torch.testing.assert_close(list(statistics), list(other_statistics), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(list(statistics), list(expected), rtol=1e-12, atol=1e-12, equal_nan=True)
        for name, value in window.state_dict().items():
            assert torch.equal(state[name], value)
            assert torch.equal(other_state[name], value)


def update_a_window_without_a_graph(rank: int, group: dist.ProcessGroup) -> tuple[list[float], Tensor]:
    """Return the means and the final state. In the second step rank 1 has no pairs, in the third it has no gradient."""
    window, means = ScoreWindow(8), []
    for step in range(4):
        has_graph = rank == 0 or step not in (1, 2)
        num_pairs = 0 if rank == 1 and step == 1 else 3
        logps = torch.arange(float(num_pairs)) + 10 * step + 5 * rank
        logps.requires_grad_(has_graph)
        output = amapo_loss(logps, torch.zeros(num_pairs), statistics=window, process_group=group)
        means.append(output.diagnostics.statistics.mean.item())
    return means, window.get_extra_state()


def test_a_rank_without_a_graph_keeps_the_same_window_as_the_others() -> None:
    (means, state), (other_means, other_state) = on_ranks(2, update_a_window_without_a_graph)
    assert means == other_means
    assert torch.equal(state, other_state)
    assert state[-1] == 6 + 3 + 3 + 6


class WithWindow(nn.Module):
    """A network with the loss and its window inside, as in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.loss_fn = small_network(), AMaPOLoss(statistics_window=6)

    def forward(self, features: Tensor) -> Any:
        return self.loss_fn(*self.network(features).squeeze(1).chunk(2))[0]

    def window_state(self) -> Tensor:
        assert isinstance(self.loss_fn.statistics, ScoreWindow)
        return self.loss_fn.statistics.get_extra_state()


def load_a_distributed_state(rank: int, group: dist.ProcessGroup) -> None:
    """Load the window with PyTorch's functions for the state of wrapped, compiled and sharded modules."""
    mesh = init_device_mesh("cpu", (2,))
    whole, from_rank_0 = (
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast) for broadcast in (False, True)
    )

    def sharded(module: nn.Module) -> Any:
        return fully_shard(module, mesh=mesh)

    compiled = partial(torch.compile, backend="eager")
    for wrap, options in (
        (DistributedDataParallel, None),
        (compiled, None),
        (sharded, whole),
        (sharded, from_rank_0),
    ):
        inner, other = WithWindow(), WithWindow()
        model, resumed = wrap(inner), wrap(other)
        model(CHOSEN[:8]).backward()
        state = get_model_state_dict(model, options=options)
        is_sent = rank == 0 or options is not from_rank_0
        set_model_state_dict(resumed, state if is_sent else {}, options=options)
        assert torch.equal(other.window_state(), inner.window_state())
        assert inner.window_state()[-1] == 4


def test_the_state_of_a_window_is_loaded_with_that_of_a_distributed_module() -> None:
    on_ranks(2, load_a_distributed_state)


# Features of the chosen and of the rejected responses of 24 pairs, which are three batches of 8.
CHOSEN, REJECTED = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(0)).unbind()


def small_network() -> nn.Sequential:
    """Return a network with the same initial weights in every call. Its outputs serve as log-probs."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))


def train(
    model: nn.Module,
    batches: list[Tensor],  # the indices [n] of the pairs of each step, n >= 0
    group: dist.ProcessGroup | None,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loss_fn = AMaPOLoss(process_group=group)
    for indices in batches:
        logps = model(torch.cat([CHOSEN[indices], REJECTED[indices]])).squeeze(1)
        loss, *_ = loss_fn(*logps.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_wrapped(rank: int, group: dist.ProcessGroup, wrapper: str) -> dict[str, Tensor]:
    """Train on two ranks, which share each batch of 8 pairs, and return the weights."""
    model = small_network()
    pairs_per_rank = ((5, 3), (8, 0), (1, 7))
    batches = [torch.arange(24).split(8)[step].split(sizes)[rank] for step, sizes in enumerate(pairs_per_rank)]
    if wrapper == "DDP":
        train(DistributedDataParallel(model), batches, group)
        return {name: value.detach() for name, value in model.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, batches, group)
    return {name: value.full_tensor().detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_wrapped_models_train_as_in_one_process(wrapper: str) -> None:
    model = small_network()
    train(model, list(torch.arange(24).split(8)), None)
    for weights in on_ranks(2, train_wrapped, wrapper):
        for name, value in model.named_parameters():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-5, atol=1e-5)
            assert not torch.equal(value, dict(small_network().named_parameters())[name])


def call_the_loss_wrongly_on_rank_1(rank: int, group: dist.ProcessGroup) -> None:
    chosen, rejected = random_logps(4)
    if rank == 1:
        with pytest.raises(ValueError, match="rejected_logps has shape"):
            amapo_loss(chosen, rejected[:3], process_group=group)
        # Rank 1 keeps its connection open for longer than the timeout of the group, so rank 0 must time out.
        time.sleep(15)
    amapo_loss(chosen, rejected, process_group=group)


def reduce_totals_on_rank_0_alone(rank: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        time.sleep(15)
    amapo_loss(*random_logps(4)).diagnostics.totals().reduced(group)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (call_the_loss_wrongly_on_rank_1, "the score statistics of process_group"),
        (reduce_totals_on_rank_0_alone, "the totals"),
    ],
    ids=["loss", "totals"],
)
def test_the_other_ranks_raise_if_one_rank_does_not_take_part(call: Any, what: str) -> None:
    with pytest.raises(Exception, match=f"{what} could not be gathered"):
        on_ranks(2, call, timeout=4)


def reduce_totals(rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the summary of both ranks, of which each has its share of the pairs and leaves some out."""
    warnings.simplefilter("error")  # no function of torch.distributed that we call may be deprecated
    pairs, weights = pairs_of_all_ranks(12), torch.arange(12) % 4 > 0
    share = slice(0, 5) if rank == 0 else slice(5, 12)
    _, diagnostics = amapo_loss(*(x[share] for x in pairs), weights=weights[share], process_group=group)
    with pytest.raises(ValueError, match="has no device to gather on"):
        Totals.none().reduced(group)
    return diagnostics.totals().reduced(group).summary()


def test_the_summary_of_reduced_totals_is_that_of_one_process() -> None:
    expected = amapo_loss(*pairs_of_all_ranks(12), weights=torch.arange(12) % 4 > 0).diagnostics.totals().summary()
    for summary in on_ranks(2, reduce_totals):
        torch.testing.assert_close(summary, expected, rtol=1e-6, atol=1e-6)


def load_a_window_on_rank_0_alone(rank: int, group: dist.ProcessGroup) -> None:
    window, other = ScoreWindow(8), ScoreWindow(8)
    for _ in range(2):
        other(torch.tensor([1.0, -2.0, 3.0], requires_grad=True), group)
    window.load_state_dict(other.state_dict())
    window(torch.tensor([4.0], requires_grad=True), group)  # the windows are equal
    if rank == 0:
        window.scores[-1] += 1e-6
    with pytest.raises(RuntimeError, match="the windows of the ranks differ"):
        window(torch.tensor([4.0], requires_grad=True), group)
    if rank == 0:
        other.reset()
    with pytest.raises(RuntimeError, match="the windows of the ranks differ"):
        amapo_loss(*random_logps(4), statistics=other, process_group=group)


def test_windows_that_differ_between_ranks_raise() -> None:
    on_ranks(2, load_a_window_on_rank_0_alone)


def pass_dtensors(rank: int, group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (2,))
    chosen, rejected = (distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in random_logps(4))
    cases: list[dict[str, Any]] = [{}, {"process_group": group}, {"statistics": ScoreWindow(8)}]
    for options in cases:
        with pytest.raises(TypeError, match="chosen_logps must be a plain tensor, got a DTensor: pass chosen_logps"):
            amapo_loss(chosen, rejected, **options)
    with pytest.raises(TypeError, match="margin must be a plain tensor, got a DTensor"):
        amapo_loss(*random_logps(4), margin=chosen)


def test_dtensors_with_an_entry_per_pair_raise() -> None:
    on_ranks(2, pass_dtensors)


def train_with_a_window_of_its_own(rank: int, group: dist.ProcessGroup) -> None:
    """DDP broadcasts the buffers of rank 0 before each forward pass. The window must not be among them."""
    window = ScoreWindow(8)
    loss_fn = AMaPOLoss(statistics=window)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss_fn = small_network(), loss_fn

        def forward(self, features: Tensor) -> Tensor:
            loss: Tensor = self.loss_fn(*self.network(features).squeeze(1).chunk(2))[0]
            return loss

    model, own_scores = DistributedDataParallel(Model()), []
    for step in range(2):
        pairs = slice(4 * (2 * step + rank), 4 * (2 * step + rank + 1))
        model(torch.cat([CHOSEN[pairs], REJECTED[pairs]])).backward()
        assert loss_fn.diagnostics is not None
        own_scores.append(loss_fn.diagnostics.scores)
    assert torch.equal(window.scores.sort().values, torch.cat(own_scores).sort().values)


def test_ddp_leaves_the_window_of_each_rank_alone() -> None:
    on_ranks(2, train_with_a_window_of_its_own)


def copy_a_loss(rank: int, group: dist.ProcessGroup) -> None:
    loss_fn = AMaPOLoss(process_group=group, statistics=ScoreWindow(8))
    clone = copy.deepcopy(loss_fn)
    assert clone.process_group is group
    shallow = copy.copy(loss_fn)
    assert shallow.process_group is group
    assert shallow.statistics is loss_fn.statistics
    loss_fn(*random_logps(4))
    assert clone.state_dict()["statistics._extra_state"][-1] == 0, "the copy has a window of its own"
    assert clone(*random_logps(4))[0].isfinite()
    with pytest.raises(TypeError, match="AMaPOLoss with a process_group cannot be pickled"):
        torch.save(loss_fn, io.BytesIO())
    torch.save(AMaPOLoss(statistics=ScoreWindow(8)), io.BytesIO())


def test_a_loss_with_a_group_can_be_copied() -> None:
    on_ranks(1, copy_a_loss)
