"""Statistics over several ranks: real gloo processes against one process with all pairs."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from amapo_loss import AdaptiveMargin, AMaPOLoss, ScoreStatistics, ScoreWindow, amapo_loss
from tests.support.generators import random_logps
from tests.support.ranks import on_ranks

Pairs = list[Tensor]  # chosen and rejected log-probs
SHARES = {
    "uneven": (5, 1, 17, 64),
    "one rank empty": (5, 0, 17, 1),
    "one pair each": (1, 1, 1, 1),
    "none": (0, 0, 0, 0),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "released": {"margin": AdaptiveMargin("released"), "label_smoothing": 0.1},
    "supplied": {"statistics": ScoreStatistics(torch.tensor(0.4), torch.tensor(1.2), torch.tensor(99))},
    "triton": {"backend": "triton"},
    "triton, sum": {"backend": "triton", "reduction": "sum"},
    "triton, supplied": {
        "backend": "triton",
        "statistics": ScoreStatistics(torch.tensor(0.4), torch.tensor(1.2), torch.tensor(99)),
    },
}
CASES = [(share, option) for share in SHARES for option in OPTIONS]
EQUAL, FAR = "equal scores", "a mean far larger than the spread"


def all_pairs(n: int, kind: str = "") -> Pairs:
    chosen, rejected = (x.detach() for x in random_logps(n))
    if kind == EQUAL:
        chosen = rejected + 0.3
    elif kind == FAR:
        chosen, rejected = 50 + 0.01 * chosen, torch.zeros(n)
    return [chosen, rejected]


def part(pairs: Pairs, sizes: tuple[int, ...], rank: int) -> Pairs:
    return [x.split(list(sizes))[rank].clone() for x in pairs]


def outcome(pairs: Pairs, **options: Any) -> dict[str, Any]:
    inputs = [x.requires_grad_() for x in pairs]
    loss, diagnostics = amapo_loss(*inputs, **options)
    return {
        "loss": loss.detach(),
        "gradient": torch.stack(torch.autograd.grad(loss.sum(), inputs)),
        "margins": diagnostics.margins,
        "statistics": diagnostics.statistics,
        "summary": diagnostics.summary(),
    }


def every_case(rank: int, group: dist.ProcessGroup) -> dict[Any, Any]:
    world = dist.get_world_size(group)
    results: dict[Any, Any] = {}
    for share, option in CASES:
        sizes = SHARES[share][:world]
        results[share, option] = outcome(
            part(all_pairs(sum(sizes)), sizes, rank), process_group=group, **OPTIONS[option]
        )
    for kind in (EQUAL, FAR):
        for backend in ("torch", "triton"):
            sizes = (32, 7, 0, 61)[:world]
            margin = AdaptiveMargin(scaling="linear")
            results[kind, backend] = outcome(
                part(all_pairs(sum(sizes), kind), sizes, rank),
                beta=1.0,
                margin=margin,
                process_group=group,
                backend=backend,
            )
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_ranks_are_one_process(world: int) -> None:
    ranks = on_ranks(world, every_case)
    for share, option in CASES:
        sizes, options = SHARES[share][:world], OPTIONS[option]
        ours = [rank[share, option] for rank in ranks]
        whole = outcome(all_pairs(sum(sizes)), **options | {"backend": "torch"})
        for other in ours[1:]:  # to the last bit
            assert all(map(torch.equal, ours[0]["statistics"], other["statistics"]))
        torch.testing.assert_close(
            [x.double() for x in ours[0]["statistics"]], [x.double() for x in whole["statistics"]], rtol=1e-6, atol=1e-7
        )
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(torch.cat([x["margins"] for x in ours]), whole["margins"], **close)
        losses = torch.cat([x["loss"].view(-1) for x in ours])
        gradient = torch.cat([x["gradient"] for x in ours], dim=1)
        if options.get("reduction") == "none":
            torch.testing.assert_close(losses, whole["loss"], **close)
        elif options.get("reduction") == "sum":
            torch.testing.assert_close(losses.sum(), whole["loss"], **close)
        else:  # what DDP's average over the ranks makes of it
            torch.testing.assert_close(losses.mean(), whole["loss"], **close)
            gradient = gradient / world
        torch.testing.assert_close(gradient, whole["gradient"], **close)
    for backend in ("torch", "triton"):
        assert not any(rank[EQUAL, backend]["margins"].any() for rank in ranks)
        sizes = (32, 7, 0, 61)[:world]
        pairs = [x.double() for x in all_pairs(sum(sizes), FAR)]
        exact = outcome(pairs, beta=1.0, margin=AdaptiveMargin(scaling="linear"))
        margins = torch.cat([rank[FAR, backend]["margins"] for rank in ranks])
        near = ((pairs[0] - pairs[1]) - exact["statistics"].mean).abs() < 1e-4
        torch.testing.assert_close(margins.double()[~near], exact["margins"][~near], rtol=1e-5, atol=0)


def compiled(rank: int, group: dist.ProcessGroup) -> None:
    sizes = (5, 3)
    for backend in ("torch", "triton"):
        options: dict[str, Any] = {"process_group": group, "backend": backend}
        expected = outcome(part(all_pairs(8), sizes, rank), **options)
        inputs = [x.requires_grad_() for x in part(all_pairs(8), sizes, rank)]
        torch.compiler.reset()
        loss = torch.compile(amapo_loss, fullgraph=True, backend="aot_eager")(*inputs, **options).loss
        torch.testing.assert_close(loss.detach(), expected["loss"])
        torch.testing.assert_close(torch.stack(torch.autograd.grad(loss, inputs)), expected["gradient"])


def test_the_collective_compiles() -> None:
    """Into the one graph, with the rest of the loss."""
    on_ranks(2, compiled)


def never_gathers(rank: int, group: dist.ProcessGroup) -> None:
    """Only rank 0 calls the loss: with a collective in it, it would not come back."""
    if rank == 0:
        for statistics in (None, ScoreWindow(8), ScoreStatistics.of):
            amapo_loss(*random_logps(4), statistics=statistics)


def test_no_collective_without_a_group() -> None:
    on_ranks(2, never_gathers, timeout=20)


def windows(rank: int, group: dist.ProcessGroup) -> list[Any]:
    window = ScoreWindow(12)
    states = []
    for step in range(6):
        sizes = ((3, 0), (1, 4), (0, 0), (20, 2), (2, 2), (5, 6))[step]
        scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step))
        if step == 1:
            scores[0] = float("nan")
        statistics = window(scores.split(sizes)[rank], group)
        states.append((statistics, {name: value.clone() for name, value in window.state_dict().items()}, scores))
    return states


def test_a_window_is_the_same_on_all_ranks_and_in_one_process() -> None:
    first, second = on_ranks(2, windows)
    window = ScoreWindow(12)
    for (statistics, state, scores), (other_statistics, other_state, _) in zip(first, second):
        alone = window(scores)
        torch.testing.assert_close(list(statistics), list(other_statistics), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(list(statistics), list(alone), rtol=1e-12, atol=1e-12, equal_nan=True)
        assert all(torch.equal(state[name], other_state[name]) for name in state)
        # Of the 20 scores that one rank has in a step, it passes on the last 12: the ring may stand elsewhere.
        assert torch.equal(state["scores"].sort().values, window.scores.sort().values)


FEATURES, TARGETS = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(0)).unbind()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))


def three_steps(model: nn.Module, rows: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Steps on these pairs of rows; a rank without any takes part all the same."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loss_fn = AMaPOLoss(process_group=group)
    for of_this_step in rows:
        both = model(torch.cat([FEATURES[of_this_step], TARGETS[of_this_step]])).squeeze(1)
        loss, *_ = loss_fn(*both.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


SPLITS = ((5, 3), (8, 0), (1, 7))


def wrapped_training(rank: int, group: dist.ProcessGroup, wrapper: str) -> dict[str, Tensor]:
    model = network()
    rows = [torch.arange(8 * k, 8 * k + 8).split(split)[rank] for k, split in enumerate(SPLITS)]
    if wrapper == "DDP":
        three_steps(DistributedDataParallel(model), rows, group)
        return {name: value.detach() for name, value in model.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    three_steps(model, rows, group)
    return {name: value.full_tensor().detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_wrapped_models_train_as_one_process(wrapper: str) -> None:
    alone = network()
    three_steps(alone, list(torch.arange(24).split(8)), None)
    for weights in on_ranks(2, wrapped_training, wrapper):
        for name, value in alone.named_parameters():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-5, atol=1e-5)
            assert not torch.equal(value, dict(network().named_parameters())[name])


def test_a_rank_that_raises_leaves_nobody_hanging() -> None:
    with pytest.raises(Exception, match=r"the score statistics of process_group could not be gathered"):
        on_ranks(2, raising, timeout=4)


def raising(rank: int, group: dist.ProcessGroup) -> None:
    chosen, rejected = random_logps(4)
    if rank == 1:
        with pytest.raises(ValueError, match="rejected_logps has shape"):
            amapo_loss(chosen, rejected[:3], process_group=group)
        time.sleep(15)  # longer than the timeout of the group: it does not even hang up
    amapo_loss(chosen, rejected, process_group=group)
