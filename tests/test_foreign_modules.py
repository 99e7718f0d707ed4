"""A mixer within a user's own module: copied, pickled, under autocast, DDP and FSDP, compiled and exported.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import holdall
from holdall import mixers
from holdall.model import seeded

WIDTH, LENGTH = 16, 12
OF_X_ALONE = [name for name in mixers.names() if name != "repeat-attention"]
"""Those whose forward takes activations alone; repeat-attention needs the tokens' ids beside them."""
QUICK = ("attention", "base-conv", "taylor", "gated-delta-net", "mamba-2")
"""Of each kind one, exported and compiled by default: a cache, a convolution, sums, a delta rule, a scan."""


def some(names: list[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


class Foreign(nn.Module):
    """A block of somebody else's, who knows nothing of Holdall but its call."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.mixer = holdall.build(name, width=WIDTH, **options)
        self.takes_ids = self.mixer.reads_tokens

    def forward(self, x_BTD: Tensor) -> Tensor:
        ids = (
            {"tokens_BT": torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2]) % 5} if self.takes_ids else {}
        )
        y_BTD, _ = self.mixer(self.norm(x_BTD), want_state=False, **ids)
        return self.out(x_BTD + y_BTD)


def made(name: str) -> tuple[Foreign, Tensor]:
    with seeded(0):
        module = Foreign(name)
        for parameter in module.parameters():  # what begins with zeros would have zero gradients before it
            parameter.data += 0.05 * torch.randn_like(parameter)
        return module, torch.randn(4, LENGTH, WIDTH)


@pytest.mark.parametrize("name", mixers.names())
def test_copies_pickles_and_weights(name: str) -> None:
    module, x_BTD = made(name)
    want = module(x_BTD)
    assert torch.equal(copy.deepcopy(module)(x_BTD), want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x_BTD), want)
    with seeded(9):
        other = Foreign(name)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x_BTD), want)


@pytest.mark.parametrize("name", mixers.names())
def test_autocast(name: str) -> None:
    """As near as the same module all in bf16, with gradients in the weights' own dtype."""
    module, x_BTD = made(name)
    want = module(x_BTD).detach()
    plain = copy.deepcopy(module).bfloat16()(x_BTD.bfloat16()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x_BTD)
    assert got.dtype == torch.bfloat16
    error, bound = (float((other.detach().float() - want).norm()) for other in (got, plain))
    assert error < 2 * bound
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------ several processes


def gradients(module: nn.Module, x_BTD: Tensor) -> None:
    module(x_BTD).square().mean().backward()


def averaged(name: str, rank: int, kind: str) -> dict[str, Tensor]:
    """In one of two processes: the gradients of two rows each, averaged by DDP or FSDP."""
    module, x_BTD = made(name)
    wrapped: nn.Module
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        how = {"mesh": init_device_mesh("cpu", (2,))}
        fully_shard(module.mixer, **how)
        wrapped = fully_shard(module, **how)
    gradients(wrapped, x_BTD[2 * rank : 2 * rank + 2])
    return {
        own: p.grad if kind == "ddp" else p.grad.full_tensor()  # type: ignore[attr-defined]
        for own, p in module.named_parameters()
        if p.grad is not None
    }


def trained(folder: Path, rank: int, kind: str, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: averaged(name, rank, kind) for name in names}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    # the wrappers go before their group: the one that outlives it ends the group's thread while it holds
    # Python's lock, for which that thread may wait
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_averaged_over_processes(kind: str, tmp_path: Path) -> None:
    """All mixers in one pair of processes, whose start takes longest."""
    names = mixers.names()
    started = [children.start(trained, tmp_path, rank, kind, names) for rank in range(2)]
    for process in started:
        process.join(240)
        assert process.exitcode == 0
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert list(found) == names
    for name in names:
        module, x_BTD = made(name)
        gradients(module, x_BTD)
        for own, parameter in module.named_parameters():
            assert parameter.grad is not None
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                found[name][own], parameter.grad, rtol=1e-4, atol=1e-5 * max(size, 1e-2), msg=f"{name}: {own}"
            )


# ------------------------------------------------------------------------------------ compiler and export


@pytest.mark.compile
@pytest.mark.parametrize("name", some(OF_X_ALONE))
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()  # or the other mixers would be versions of one frame, and there may be eight
    module, x_BTD = made(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_BTD), module(x_BTD), rtol=1e-4, atol=1e-4)


SIZES: dict[str, tuple[int, ...]] = {"rows": (7, LENGTH), "tokens": (4, 33)}
"""Other sizes than those of the example that is traced."""


@pytest.mark.compile
@pytest.mark.parametrize("name", some(OF_X_ALONE))
@torch.no_grad()
def test_exported_with_the_sizes_that_it_says(name: str) -> None:
    """What is traced computes the same, also for other sizes where they are left open; and for no more."""
    module, x_BTD = made(name)
    export: Callable[..., Any] = functools.partial(torch.export.export, module.eval(), (x_BTD,), strict=False)
    exported = export().module()
    torch.testing.assert_close(exported(x_BTD), module(x_BTD), rtol=1e-4, atol=1e-4)
    for dim, size in enumerate(("rows", "tokens")):
        free, more = ({"x_BTD": {dim: torch.export.Dim(size, min=2, max=most)}} for most in (64, 4096))
        if size not in mixers.entry(name).config.export_sizes:
            with pytest.raises(
                Exception, match=r"[Cc]onstraint|[Ss]pecializ|NaN comparison"
            ):  # of several classes
                _ = [export(dynamic_shapes=range_) for range_ in (free, more)]  # within one chunk any may do
            continue
        other_BTD = torch.randn(*SIZES[size], WIDTH, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            export(dynamic_shapes=free).module()(other_BTD), module(other_BTD), rtol=1e-4, atol=1e-4
        )


@pytest.mark.quick
def test_what_can_be_exported_is_said_where_users_look() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs" / "interop.md").read_text().split())
    fixed = [name for name in mixers.names() if not mixers.entry(name).config.export_sizes]
    free = [name for name in mixers.names() if "tokens" in mixers.entry(name).config.export_sizes]
    assert f"rows may be left open, but not in {listed(fixed)};" in page
    assert f"the number of tokens in {listed(free)}." in page
    assert "torch.export: any number of rows\n" in str(mixers.entry("taylor"))


def listed(names: list[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}" if first else last
