"""Check log-probs from a vocabulary that is split over real gloo processes against those of one process."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from amapo_loss import amapo_loss, linear_sequence_logps, linear_token_logps, sequence_logps
from benchmarks.speed.scaling import recorded_collectives
from tests.logps.test_linear_head import (
    WITH_GRADIENTS,
    WITHOUT_GRADIENTS,
    Head,
    column_major,
    confident_head,
    gradients,
    random_head,
    random_labels,
    rounding_error_bounds,
)
from tests.support.backends import tiled
from tests.support.logps import IGNORE_INDEX, reference_logps, relative_error
from tests.support.ranks import on_ranks


def of_rank(head: Head, sizes: list[int], rank: int) -> Head:
    """Return the head with the rows of one rank, which are leaves of their own. `sizes` has those of all ranks."""

    def rows(x: Tensor) -> Tensor:
        shard: Tensor = x.detach().split(sizes)[rank].clone().requires_grad_(x.requires_grad)
        return shard

    return head._replace(weight=rows(head.weight), bias=None if head.bias is None else rows(head.bias))


def random_sizes(vocab_size: int, ranks: int, generator: random.Random) -> list[int]:
    """Return the numbers of rows of the ranks, some of which may be 0."""
    cuts = sorted(generator.randint(0, vocab_size) for _ in range(ranks - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, vocab_size])]


def check_random_heads(rank: int, group: Any, num_heads: int) -> None:
    """Compare the log-probs, entropies and gradients of a rank with those of the whole head in float64."""
    for seed in range(num_heads):
        choose = random.Random(seed)  # the same on all ranks
        n, length, hidden_size = choose.randint(0, 4), choose.randint(0, 7), choose.randint(1, 9)
        sizes = random_sizes(choose.randint(1, 40), dist.get_world_size(group), choose)
        # Every third head is frozen. Its ranks have to take the same number of tiles.
        requires_grad = choose.choice([*WITH_GRADIENTS, WITHOUT_GRADIENTS, "hidden", "hidden"])
        dtype = choose.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
        keep_bytes, average = choose.choice([0, 100, 400, 10**9]), choose.choice([True, False])
        scale, softcap = choose.choice([(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 1.5)])

        head = random_head(n, length, hidden_size, sum(sizes), requires_grad, seed)
        head = head.to("cpu", dtype).to("cpu", torch.float64)._replace(scale=scale, softcap=softcap)
        labels = random_labels(n, length, sum(sizes), choose.random(), seed)
        grad_output = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = reference_logps(head.logits(), labels, average)
        bounds = rounding_error_bounds(head, labels, grad_output, dtype, average, shift=True)

        with tiled(choose.choice(["torch", "triton"]), choose.randint(1, 200)):
            local = of_rank(head.to("cpu", dtype), sizes, rank)
            options = {"keep_bytes": keep_bytes, "average": average, "vocab_group": group}
            actual = local.sequence_logps(labels, **options)
            rtol = 8 * torch.finfo(actual.dtype).eps
            torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=bounds.logps)
            _, entropies = local.sequence_logps(labels, return_entropy=True, **options)
            _, expected_entropies = head.sequence_logps(labels, return_entropy=True, average=average)
            atol = bounds.logps * 10 * sum(sizes)
            torch.testing.assert_close(entropies.double(), expected_entropies, rtol=rtol, atol=atol)
            if not local.leaves:
                continue
            actual_gradients = gradients(actual, local, grad_output)
        for gradient, expected_gradient, bound in zip(
            actual_gradients, gradients(expected, head, grad_output), bounds.gradients
        ):
            if expected_gradient.shape == head.hidden.shape:
                expected_rows, allowed_rows = expected_gradient, bound
            else:
                expected_rows, allowed_rows = expected_gradient.split(sizes)[rank], bound.split(sizes)[rank]
            finfo = torch.finfo(dtype)
            allowed = allowed_rows + 2 * finfo.eps * expected_rows.abs() + finfo.tiny
            assert gradient.dtype == dtype
            assert ((gradient.double() - expected_rows).abs() <= allowed).all(), f"seed {seed}"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_log_probs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    on_ranks(ranks, check_random_heads, 60)


def errors_of_confident_tokens(rank: int, group: Any, requires_grad: str) -> list[float]:
    """Return the errors of the gradient of the hidden states in bfloat16: of one rank, all, and sharded tokens."""
    head, target_ids = confident_head(64, 128, 500, shared_mean=3.0, requires_grad=requires_grad)
    expected = head.logits().log_softmax(-1).gather(1, target_ids[:, None]).squeeze(1)
    assert (expected.exp() > 0.99).double().mean() > 0.9
    (expected_gradient, *_) = gradients(expected, head, torch.ones(64))
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    errors = []
    for split, sharded in ((False, False), (True, False), (True, True)):
        half: Any = (of_rank(head, [100, 250, 150], rank) if split else head).to("cpu", torch.bfloat16)
        if sharded:
            hidden = distribute_tensor(half.hidden.detach(), mesh, [Shard(0)]).requires_grad_()
            half = half._replace(hidden=hidden)
        with tiled("triton", 10_000):  # plain PyTorch converts bfloat16 on a CPU, and a converted head is not frozen
            logps = linear_token_logps(half.hidden, half.weight, target_ids, vocab_group=group if split else None)
            (gradient, *_) = gradients(logps, half, torch.ones(64))
        errors.append(relative_error(gradient.full_tensor() if sharded else gradient, expected_gradient))  # type: ignore[attr-defined]
    return errors


@pytest.mark.parametrize("requires_grad", ["hidden", "hidden weight"])
def test_gradients_of_confident_tokens_are_as_exact_as_in_one_process(requires_grad: str) -> None:
    """The rows of the weight share a mean. Each rank's part of a gradient is large, and their sum is small."""
    for of_one, of_all, of_sharded in on_ranks(3, errors_of_confident_tokens, requires_grad):
        assert of_all < 1.05 * of_one
        assert of_sharded < 1.05 * of_one


def check_dtensors(rank: int, group: Any) -> None:
    """Compare DTensors for the weight, the bias, the hidden states and the logits with plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    for requires_grad in WITH_GRADIENTS:
        head, labels = random_head(3, 8, 5, 30, requires_grad, seed=1), random_labels(3, 8, 30)
        expected = head.sequence_logps(labels)
        expected_gradients = gradients(expected, head, torch.arange(3))

        def shard(x: Tensor, dim: int) -> Any:
            return distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_(x.requires_grad)

        for place in (None, Replicate(), Shard(1), Shard(0)):
            hidden: Any = head.hidden.detach()
            if place is not None:
                hidden = distribute_tensor(hidden, mesh, [place])
            hidden.requires_grad_(head.hidden.requires_grad)
            bias = None if head.bias is None else shard(head.bias, 0)
            split = head._replace(hidden=hidden, weight=shard(head.weight, 0), bias=bias)
            actual = split.sequence_logps(labels)
            torch.testing.assert_close(actual, expected)
            for gradient, wanted in zip(gradients(actual, split, torch.arange(3)), expected_gradients):
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                torch.testing.assert_close(whole, wanted)

        logits = head.logits().detach().requires_grad_()
        (wanted,) = torch.autograd.grad(sequence_logps(logits, labels), logits, torch.arange(3.0))
        split_logits = shard(logits, -1)
        actual, entropies = sequence_logps(split_logits, labels, return_entropy=True)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(entropies, sequence_logps(logits, labels, return_entropy=True)[1])
        (gradient,) = torch.autograd.grad(actual, split_logits, torch.arange(3.0))
        assert gradient.placements == (Shard(2),)
        torch.testing.assert_close(gradient.full_tensor(), wanted)


def check_loss_parallel(rank: int, group: Any) -> None:
    """Compare split logits with those of PyTorch's `loss_parallel`, the only peer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    logits, labels = torch.randn(2, 6, 20, dtype=torch.float64), random_labels(2, 6, 20)
    ours, theirs = (distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_() for _ in range(2))
    sequence_logps(ours, labels, average=False, shift=False).sum().backward()
    with loss_parallel():
        loss: Any = torch.nn.functional.cross_entropy(
            theirs.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        (-loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def check_on_a_mesh(rank: int, group: Any) -> None:
    for check in (check_dtensors, check_loss_parallel, check_compiled, check_autocast, check_strides):
        check(rank, group)


def test_dtensors_compilation_and_autocast() -> None:
    """One test for all, because starting the processes takes longer than the checks."""
    on_ranks(4, check_on_a_mesh)


def check_compiled(rank: int, group: Any) -> None:
    sizes, labels = [4, 12, 5, 9], random_labels(3, 8, 30)
    for requires_grad in ("hidden", "hidden weight bias"):
        head = of_rank(random_head(3, 8, 5, 30, requires_grad), sizes, rank)

        def step(*leaves: Tensor, head: Head = head) -> list[Tensor]:
            logps = head.sequence_logps(labels, vocab_group=group)
            return [logps, *torch.autograd.grad(logps.sum(), leaves)]

        @partial(torch.compile, fullgraph=True, backend="aot_eager")
        def compiled(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_sequence_logps(hidden, weight, labels, bias, vocab_group=group)

        expected = step(*head.leaves)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # needed before torch 2.10
            logps = compiled(*head[:3])
        torch.testing.assert_close([logps, *torch.autograd.grad(logps.sum(), head.leaves)], expected)


def check_autocast(rank: int, group: Any) -> None:
    """Float32 parameters under autocast: the products are those of bfloat16, as in one process."""
    head, labels = random_head(3, 8, 16, 30, "hidden weight").to("cpu", torch.float32), random_labels(3, 8, 30)
    with torch.autocast("cpu", torch.bfloat16):
        expected = head.sequence_logps(labels)
        actual = of_rank(head, [4, 12, 5, 9], rank).sequence_logps(labels, vocab_group=group)
    torch.testing.assert_close(actual, expected)


def check_strides(rank: int, group: Any) -> None:
    """Collectives take contiguous tensors only, and the gradient of a leaf has its strides."""
    target_ids = torch.arange(6)
    for requires_grad in ("hidden", "hidden weight"):
        head = random_head(6, 1, 8, 30, requires_grad)
        hidden = column_major(head.hidden.detach().squeeze(1)).requires_grad_()
        expected = gradients(head.sequence_logps(target_ids[:, None], shift=False), head, target_ids)
        local = of_rank(head._replace(hidden=hidden), [4, 12, 5, 9], rank)
        actual = gradients(linear_token_logps(hidden, local.weight, target_ids, vocab_group=group), local, target_ids)
        torch.testing.assert_close(actual[0], expected[0].squeeze(1))


def collectives(rank: int, group: Any) -> dict[str, Any]:
    """Return what a rank sends, for each kind of head."""
    result: dict[str, Any] = {}
    target_ids = torch.arange(10)
    for name, requires_grad in {"none": "", "frozen": "hidden", "trainable": "hidden weight"}.items():
        head = of_rank(random_head(1, 10, 6, 30, requires_grad).to("cpu", torch.float32), [10, 20], rank)
        hidden = head.hidden[0]

        def step(hidden: Tensor = hidden, head: Head = head) -> None:
            logps = linear_token_logps(hidden, head.weight, target_ids, vocab_group=group)
            if logps.requires_grad:
                logps.sum().backward()

        # tiles of 4 tokens and the 20 rows of the larger shard
        with tiled("torch", 20 * 4), recorded_collectives() as result[name]:
            step()
    mesh = init_device_mesh("cpu", (2,))
    shard = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
    hidden, weight = shard(torch.randn(10, 6)).requires_grad_(), shard(torch.randn(30, 6))
    with CommDebugMode() as communication, recorded_collectives() as result["sequence parallel"]:
        linear_token_logps(hidden, weight, target_ids).sum().backward()
    result["of DTensors"] = {str(op): count for op, count in communication.get_comm_counts().items()}
    return result


def test_only_numbers_of_tokens_and_one_gradient_are_sent() -> None:
    (result, _) = on_ranks(2, collectives)
    sizes, numbers = 3 * 8, 10 * 3 * 4  # three int64, and three float32 for each of the 10 tokens
    gradient = 10 * 6 * 4  # [n, H] in float32
    assert result["none"] == {"all_gather": [sizes, numbers], "all_reduce": []}
    assert result["trainable"] == {"all_gather": [sizes, numbers], "all_reduce": [gradient]}
    frozen = result["frozen"]
    assert frozen["all_gather"] == [sizes, 4 * 3 * 4, 4 * 3 * 4, 2 * 3 * 4]
    assert frozen["all_reduce"] == [4 * 6 * 4, 4 * 6 * 4, 2 * 6 * 4]
    assert result["sequence parallel"]["all_reduce"] == [gradient]
    ((operation, count),) = result["of DTensors"].items()  # of the hidden states, and nothing in backward
    assert "all_gather" in operation
    assert count == 1


def messages(rank: int, group: Any) -> dict[str, str]:
    """Return the message of each error."""
    mesh, plane, reverse = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1)), DeviceMesh("cpu", [1, 0])
    head, labels, targets = random_head(1, 4, 8, 30, "bias"), random_labels(1, 4, 30), torch.arange(4)
    hidden, weight, bias = head.hidden[0], head.weight.detach(), torch.zeros(30)
    local, others = weight.split(15)[rank], [dist.new_group([i]) for i in (0, 1)][1 - rank]

    def shard(x: Tensor, *placements: Any, mesh: Any = mesh) -> Any:
        return distribute_tensor(x.detach(), mesh, placements or [Shard(0)])

    calls: dict[str, Callable[[], Any]] = {
        "a group of others": lambda: linear_token_logps(hidden, local, targets, vocab_group=others),
        "no group": lambda: linear_token_logps(hidden, local, targets, vocab_group="tp"),  # type: ignore[call-overload]
        "two groups": lambda: linear_token_logps(hidden, shard(weight), targets, vocab_group=group),
        "another dimension": lambda: linear_token_logps(hidden, shard(weight, Shard(1)), targets),
        "ranks in another order": lambda: linear_token_logps(hidden, shard(weight, mesh=reverse), targets),
        "not sharded": lambda: linear_token_logps(hidden, shard(weight, Replicate()), targets),
        "sharded logits": lambda: sequence_logps(shard(head.logits()), labels),
        "a plain bias": lambda: linear_token_logps(hidden, shard(weight), targets, bias),
        "hidden of a plain head": lambda: linear_token_logps(shard(hidden), weight, targets),
        "hidden on another mesh": lambda: linear_token_logps(
            shard(hidden, Shard(0), Replicate(), mesh=plane), shard(weight), targets
        ),
        "split targets": lambda: linear_token_logps(hidden, shard(weight), shard(targets)),
        "split labels": lambda: linear_sequence_logps(head.hidden, shard(weight), shard(labels, Shard(1))),
        "other targets": lambda: linear_token_logps(hidden, shard(weight), targets + rank),
        "other lengths": lambda: linear_token_logps(hidden[rank:], shard(weight), targets[rank:]),
        "other labels": lambda: sequence_logps(shard(head.logits(), Shard(2)), labels.roll(rank, 1)),
        "an ignored label": lambda: sequence_logps(
            shard(head.logits(), Shard(2)), torch.zeros_like(labels).index_fill(0, torch.tensor(0), -100 * rank)
        ),
        "a target outside": lambda: linear_token_logps(hidden, shard(weight), targets + 27),
        "a bias of another length": lambda: linear_token_logps(hidden, local, targets, bias, vocab_group=group),
    }
    result = {}
    for name, call in calls.items():
        try:
            call()
            result[name] = "no error"
        except (TypeError, ValueError, IndexError) as error:
            result[name] = f"{type(error).__name__}: {error}"
    return result


def test_errors() -> None:
    (result, _) = on_ranks(2, messages)
    other_tokens = (
        "ValueError: all ranks that share the vocabulary must have the same tokens, got different ones on the ranks"
    )
    prefixes = {
        "a group of others": "TypeError: vocab_group must be a torch.distributed group that this rank belongs to",
        "no group": "TypeError: vocab_group must be a torch.distributed group",
        "two groups": "ValueError: vocab_group must be None for a DTensor, whose mesh has the group",
        "another dimension": "ValueError: weight must be a plain tensor or a DTensor that is sharded on the vocabulary",
        "not sharded": "ValueError: weight must be a plain tensor or a DTensor that is sharded on the vocabulary",
        "sharded logits": "ValueError: logits must be a plain tensor or a DTensor that is sharded on the vocabulary",
        "ranks in another order": "ValueError: the ranks of a mesh must be in ascending order",
        "a plain bias": "ValueError: bias must be split over ranks as weight is",
        "hidden of a plain head": "TypeError: hidden must be a plain tensor, got a DTensor: pass hidden.full_tensor()",
        "hidden on another mesh": "ValueError: hidden must be a plain tensor or a DTensor on a mesh of the ranks",
        "split targets": "TypeError: targets must be a plain tensor, got a DTensor",
        "split labels": "TypeError: labels must be a plain tensor, got a DTensor",
        "other targets": other_tokens,
        "other lengths": other_tokens,
        "other labels": other_tokens,
        "an ignored label": other_tokens,
        "a target outside": "IndexError: token ids must be in [0, 30), got 30",
        "a bias of another length": "ValueError: bias must be (15,), one entry per vocabulary token",
    }
    assert result.keys() == prefixes.keys()
    for name, prefix in prefixes.items():
        assert result[name].startswith(prefix), (name, result[name])


def check_data_and_tensor_parallel(rank: int, group: Any) -> None:
    """Two groups of pairs and a vocabulary in two parts: the statistics are those of the data-parallel group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    head, labels = random_head(8, 6, 5, 30, "hidden weight"), random_labels(8, 6, 30)
    expected = amapo_loss(*head.sequence_logps(labels).chunk(2))
    expected_gradients = gradients(expected.loss, head, torch.tensor(1.0))

    mine = torch.tensor([0, 1, 4, 5]) + 2 * mesh.get_local_rank("dp")  # two chosen responses and two rejected ones
    weight: Any = distribute_tensor(head.weight.detach(), mesh["tp"], [Shard(0)]).requires_grad_()
    split = head._replace(hidden=head.hidden.detach()[mine].requires_grad_(), weight=weight)
    logps = split.sequence_logps(labels[mine])
    actual = amapo_loss(*logps.chunk(2), process_group=mesh["dp"].get_group())
    torch.testing.assert_close(actual.diagnostics.statistics, expected.diagnostics.statistics)
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)]):  # nobody would add up the gradients over dp
        on_the_whole_mesh = distribute_tensor(head.weight.detach(), mesh, placements)
        with pytest.raises(ValueError, match="over a mesh of one dimension, got the placements"):
            linear_sequence_logps(split.hidden, on_the_whole_mesh, labels[mine])
    grad_hidden, grad_weight = gradients(actual.loss, split, torch.tensor(1.0))
    # As DDP does: the mean over the data-parallel ranks.
    torch.testing.assert_close(grad_hidden / 2, expected_gradients[0][mine])
    whole = grad_weight.full_tensor() / 2  # type: ignore[attr-defined]
    dist.all_reduce(whole, group=mesh["dp"].get_group())
    torch.testing.assert_close(whole, expected_gradients[1])


def test_statistics_over_the_data_parallel_ranks_only() -> None:
    on_ranks(4, check_data_and_tensor_parallel)


class LogProbs(torch.nn.Module):
    """A head with its log-probs in forward, where FSDP2 has gathered the weight. `docs/scale.md` shows the pattern."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, self.weight, labels)


def check_fsdp(rank: int, group: Any) -> None:
    """The ranks have other pairs, and FSDP2 shards the weight, adds up its gradients and averages them."""
    head, labels = random_head(8, 6, 5, 30, "hidden weight"), random_labels(8, 6, 30)
    expected = amapo_loss(*head.sequence_logps(labels).chunk(2))
    (_, expected_gradient) = gradients(expected.loss, head, torch.tensor(1.0))
    mine = torch.tensor([0, 1, 4, 5]) + 2 * rank
    module: Any = fully_shard(LogProbs(head.weight.detach()), mesh=init_device_mesh("cpu", (2,)))
    logps = module(head.hidden.detach()[mine], labels[mine])
    amapo_loss(*logps.chunk(2), process_group=group).loss.backward()
    torch.testing.assert_close(module.weight.grad.full_tensor(), expected_gradient)
    with pytest.raises(ValueError, match="call this inside the forward of the module that holds the weight"):
        linear_sequence_logps(head.hidden.detach()[mine], module.weight, labels[mine])


def test_a_head_that_fsdp2_shards() -> None:
    on_ranks(2, check_fsdp)
