"""The cross-entropy kernels against the definition in fp64, and no further from it than plain PyTorch is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdall.contract.forms import KernelError
from holdall.kernels import cross_entropy
from holdall.kernels.cross_entropy import linear_cross_entropy
from holdall.ops.cross_entropy import linear_cross_entropy as plain
from holdall.ops.cross_entropy import linear_cross_entropy_loop as definition

WIDE = 272
"""A width at which chunks of logits are written; all smaller ones are fused, but in fp32."""


pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(
    count: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    members: tuple[int, ...] = (),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(*members, count, width, generator=rng)
    head = torch.randn(*members, vocab, width, generator=rng) * 3 / width**0.5
    target = torch.randint(vocab, (*members, count), generator=rng)
    # half of the predictions are right, or `right` would hardly be tried
    picked = (h @ head.mT).argmax(-1)
    target = torch.where(torch.rand(target.shape, generator=rng) < 0.5, picked, target)
    h, head = (x.to(device, dtype).requires_grad_() for x in (h, head))
    return h, head, target.to(device)


Function = Callable[..., tuple[Tensor, Tensor]]


def results(function: Function, h: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Loss, right, and the gradients of a multiple of the loss."""
    loss, right = function(h, head, target)
    weight = torch.linspace(2, 3, loss.numel(), device=h.device).view(loss.shape)
    return loss, right, *torch.autograd.grad((weight * loss).sum(), (h, head))


def truth(h: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return definition(h, head, target).mean(), (h @ head.mT).argmax(-1) == target


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm().detach() / want.norm().detach())


def check(h: Tensor, head: Tensor, target: Tensor, *, vmap: bool = False) -> None:
    """Ours is at most twice as far from fp64 as plain PyTorch in the same dtype, in blocks or in one."""

    def run(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        return results(torch.func.vmap(function) if vmap else function, *tensors)

    ours = run(linear_cross_entropy, h, head, target)
    theirs = run(plain, h, head, target), run(truth, h, head, target)
    want = run(truth, *doubled(h, head, target))
    assert [x.dtype for x in ours] == [torch.float32, torch.bool, h.dtype, head.dtype]
    # two near logits may change places by rounding
    assert (ours[1] != want[1]).float().mean() <= (0.02 if h.dtype != torch.float32 else 0.0)
    for name, at in {"loss": 0, "h": 2, "head": 3}.items():
        off, theirs_off = error(ours[at], want[at]), max(error(each[at], want[at]) for each in theirs)
        # one rounding of the result is nobody's fault
        bound = 2 * theirs_off + torch.finfo(theirs[0][at].dtype).eps
        assert off <= bound, f"{name}: {off:.3g}, plain PyTorch {theirs_off:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("count", "vocab", "width"),
    [
        (1, 50, 16),
        (63, 300, 48),
        (64, 256, 64),
        (65, 650, 100),
        (65, 300, WIDE),
        *(
            pytest.param(*shape, marks=pytest.mark.gpu)
            for shape in [(1000, 8192, 128), (16384, 8192, 64), (1000, 8192, 256), (1000, 50257, 1024)]
        ),
    ],
)
def test_loss_and_gradients_are_as_near_as_plain_pytorch(
    count: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(*inputs(count, vocab, width, dtype, device))


@pytest.mark.parametrize("width", [48, WIDE])
def test_the_members_of_a_population_have_their_own_heads(width: int, device: torch.device) -> None:
    h, head, target = inputs(70, 150, width, torch.bfloat16, device, members=(3,))
    check(h, head, target, vmap=True)
    losses, _, *grads = results(torch.func.vmap(linear_cross_entropy), h, head, target)
    for member in range(3):
        loss, _ = linear_cross_entropy(h[member], head[member], target[member])
        assert loss == losses[member]
    assert all(grad.isfinite().all() for grad in grads)


def test_members_may_share_a_head(device: torch.device) -> None:
    h, head, target = inputs(20, 50, 16, torch.bfloat16, device, members=(2,))
    shared = head[0].detach().requires_grad_()
    losses, _ = torch.func.vmap(linear_cross_entropy, in_dims=(0, None, 0))(h, shared, target)
    (got,) = torch.autograd.grad(losses.sum(), shared)
    want = sum(results(linear_cross_entropy, h[m], shared, target[m])[3] / 2 for m in range(2))
    torch.testing.assert_close(got, want, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("width", [48, WIDE])
def test_autocast_reads_bf16_and_leaves_master_gradients(width: int, device: torch.device) -> None:
    h, head, target = inputs(65, 300, width, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, _, *grads = results(linear_cross_entropy, h, head, target)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (h, head)]
    want = results(truth, *doubled(*rounded, target))
    assert all(x.dtype == torch.float32 for x in (loss, *grads))
    assert error(loss, want[0]) < 1e-5
    assert all(error(got, exact) < 4e-3 for got, exact in zip(grads, want[2:], strict=True))


def test_autocast_over_a_population_with_activations_in_bf16(device: torch.device) -> None:
    """As training calls it: narrow activations, master weights."""
    h, head, target = inputs(40, 150, 48, torch.bfloat16, device, members=(2,))
    master = head.detach().float().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = results(torch.func.vmap(linear_cross_entropy), h, master, target)
    narrow = results(torch.func.vmap(linear_cross_entropy), h, head, target)
    assert [x.dtype for x in mixed[2:]] == [torch.bfloat16, torch.float32]
    for a, b in zip(mixed[:3], narrow[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mixed[3].bfloat16(), narrow[3])


def test_chunks_add_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, width in ((torch.bfloat16, WIDE), (torch.float32, 16)):
        h, head, target = inputs(20, 60, width, dtype, device, members=(2,))
        whole = results(torch.func.vmap(linear_cross_entropy), h, head, target)
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, "CHUNK_LOGITS", 2 * 60 * 8)
            parts = results(torch.func.vmap(linear_cross_entropy), h, head, target)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("programs_for", [1, 100])
def test_parts_of_a_row_of_blocks_add_up(
    programs_for: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both without any splitting and with as many parts as there are tiles."""
    each = (lambda tiles: tiles) if programs_for == 1 else (lambda tiles: 1)
    monkeypatch.setattr(
        cross_entropy, "_split", lambda programs, tiles, *_: (-(-tiles // each(tiles)), each(tiles))
    )
    check(*inputs(300, 400, 48, torch.bfloat16, device))


@pytest.mark.parametrize("width", [48, WIDE])
def test_the_same_bits_twice(width: int, device: torch.device) -> None:
    args = inputs(300 if device.type == "cuda" else 65, 1000, width, torch.bfloat16, device)
    for a, b in zip(results(linear_cross_entropy, *args), results(linear_cross_entropy, *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_gradients_loss_and_right_are_the_same(dtype: torch.dtype, device: torch.device) -> None:
    h, head, target = inputs(65, 300, 48, dtype, device)
    loss, right = linear_cross_entropy(h, head, target)
    with torch.no_grad():
        alone, right_alone = linear_cross_entropy(h, head, target)
    assert torch.equal(loss, alone)
    assert torch.equal(right, right_alone)
    assert not alone.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype, device: torch.device) -> None:
    h, head, target = inputs(37, 150, 16, dtype, device)
    h = (h.detach() * 1e4).requires_grad_()
    loss, _, *grads = results(linear_cross_entropy, h, head, target)
    assert error(loss, truth(*doubled(h, head, target))[0]) < 1e-5
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_logits_are_not_all_right(dtype: torch.dtype, device: torch.device) -> None:
    """Of equal logits the first is the guess: a dead model does not score."""
    h, head, target = inputs(20, 1300, 16, dtype, device)
    target[:10:2], target[1:10:2] = 0, 1299
    _, right = linear_cross_entropy(torch.zeros_like(h), head, target)
    assert torch.equal(right, target == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("outside", [-100, 50, 1 << 20])
def test_a_target_outside_of_the_vocabulary_is_no_number(
    outside: int, dtype: torch.dtype, device: torch.device
) -> None:
    h, head, target = inputs(20, 50, 16, dtype, device)
    target[3] = outside
    loss, right = linear_cross_entropy(h, head, target)
    assert loss.isnan()
    assert not right[3]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_diverged_model_is_no_number(dtype: torch.dtype, device: torch.device) -> None:
    h, head, target = inputs(20, 50, 16, dtype, device)
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            h[3, 3] = broken
        loss, _ = linear_cross_entropy(h, head, target)
        assert not loss.isfinite()


def test_transposed_operands(device: torch.device) -> None:
    h, head, target = inputs(20, 50, 16, torch.bfloat16, device)
    want = linear_cross_entropy(h, head, target)[0]
    assert linear_cross_entropy(h.mT.contiguous().mT, head.mT.contiguous().mT, target)[0] == want


def test_different_dtypes_need_autocast(device: torch.device) -> None:
    h, head, target = inputs(20, 50, 16, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"h is torch.bfloat16 and head is torch.float32.*autocast"):
        linear_cross_entropy(h, head.float(), target)


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelError, match="float64"):
        linear_cross_entropy(*inputs(20, 50, 16, torch.float64, device))


@pytest.mark.compile
@pytest.mark.parametrize("width", [16, WIDE])
def test_compiles_whole(width: int, device: torch.device) -> None:
    args = inputs(20, 50, width, torch.bfloat16, device)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, *args), results(linear_cross_entropy, *args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, WIDE])
def test_a_cuda_graph_holds_it(width: int, device: torch.device) -> None:
    def step(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, head, target = tensors  # new leaves: a leaf belongs to the stream that first saw it
        leaves = h.detach().requires_grad_(), head.detach().requires_grad_()
        return results(torch.func.vmap(linear_cross_entropy), *leaves, target)

    args, others = (inputs(4096, 1000, width, torch.bfloat16, device, members=(2,), seed=s) for s in (0, 1))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(args)
    with torch.no_grad():
        for old, new in zip(args, others, strict=True):
            old.copy_(new)
    graph.replay()
    for a, b in zip(got, step(others), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu("tens of GB")
def test_more_than_2_to_31_elements(device: torch.device) -> None:
    count, width, vocab = (1 << 31) // 64 + 1000, 64, 128
    h = torch.randn(count, width, device=device, dtype=torch.bfloat16).requires_grad_()
    head = torch.randn(vocab, width, device=device, dtype=torch.bfloat16)
    target = torch.randint(vocab, (count,), device=device)
    loss, right = linear_cross_entropy(h, head, target)
    (grad,) = torch.autograd.grad(count * loss, h)
    tail = slice(count - 1000, count)
    own = h[tail].detach().requires_grad_()
    want = definition(own.double(), head.double(), target[tail])
    (want_grad,) = torch.autograd.grad(want.sum(), own)
    assert error(grad[tail], want_grad.double()) < 1e-2
    assert (right[tail] != ((own @ head.T).argmax(-1) == target[tail])).float().mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, WIDE])
def test_another_number_of_predictions_compiles_nothing(width: int, device: torch.device) -> None:
    from triton import knobs

    compiled: list[str] = []
    for count in (64, 1024):
        results(linear_cross_entropy, *inputs(count, 300, width, torch.bfloat16, device))
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: compiled.append(fn.name)
        for count in (1, 63, 65, 1000, 5000):
            results(linear_cross_entropy, *inputs(count, 300, width, torch.bfloat16, device))
    assert not compiled
