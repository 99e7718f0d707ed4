"""What a decode step launches: one kernel for all that lies between two products."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdall.contract import forms
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig
from holdall.precision import compute_in
from holdall.testing import laws

HALF = torch.bfloat16
LAYERS = (
    BaseConvConfig(width=32, expand=4, form="kernel"),
    TaylorConfig(width=32, heads=2, feature_dim=4, form="kernel"),
    SlidingWindowConfig(width=32, heads=2, window=5, rotary=1.0, bias=False, form="kernel"),
    BaseConvConfig(width=32, expand=4, form="kernel"),
)
"""One of each kind of Based's layers, and a block after the last kind."""

pytestmark = pytest.mark.usefixtures("poisoned")


class Launches(TorchDispatchMode):
    """Operations that compute or copy, by name: all but views and new memory."""

    free = frozenset(
        {
            *("view", "_unsafe_view", "unsqueeze", "squeeze", "slice", "select", "expand", "t", "transpose"),
            *("alias", "split", "split_with_sizes", "detach", "empty", "empty_like", "new_empty"),
            "promote_types",
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname not in self.free:
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(device: torch.device) -> Model:
    """A Based whose blocks compute in bf16."""
    torch.manual_seed(0)
    config = ModelConfig(vocab=64, width=32, layers=LAYERS, mlp=48, mlp_kind="swiglu", norm="rms")
    return compute_in(HALF, config.build().to(device)).eval()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also in the interpreter."""
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_step_of_based_has_no_kernel_too_many(rows: int, model: Model, device: torch.device) -> None:
    states, token_B1 = (
        model.init_states(rows, device=device),
        torch.ones(rows, 1, dtype=torch.long, device=device),
    )
    model.hidden(token_B1, states, inplace=True)  # the first call looks at what a state is
    addresses = [tensor.data_ptr() for state in states for tensor in state]
    with Launches() as launches:
        _, after = model.hidden(token_B1, states, inplace=True)
    assert launches.count == {
        "embedding": 1,
        "layer_norm_forward": 1,  # of the first layer, before which nothing is added
        "add_norm_inplace": 2 * 4,
        "few_rows_linear": 4 * 4,  # MLPs with their SwiGLU, into mixers and out of them
        "gated_conv_inplace": 2,  # all between a convolution's projections, and its state
        "taylor_step_inplace": 1,
        "rotate_both": 1,
        "window_attention_step_inplace": 1,
        "copy_": 1,  # a window's count of tokens
    }
    assert [tensor.data_ptr() for state in after for tensor in state] == addresses


@torch.no_grad()
def test_and_it_is_as_exact_as_the_kernels_one_by_one(
    model: Model, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and states after a prompt and some steps, against the whole in fp64."""
    tokens_BT = torch.randint(64, (3, 12), device=device, generator=torch.Generator(device).manual_seed(0))

    def read() -> dict[str, torch.Tensor]:
        h_BTD, states = model.hidden(tokens_BT[:, :8])
        outs = [h_BTD]
        for token_B1 in tokens_BT[:, 8:].split(1, dim=1):
            h_B1D, states = model.hidden(token_B1, states, inplace=True)
            outs.append(h_B1D)
        kept = {f"{i}.{name}": t for i, state in enumerate(states) for name, t in state._asdict().items()}
        return {"h": torch.cat(outs, 1), **kept}

    truth_model = ModelConfig.from_dict(
        {**model.config.to_dict(), "layers": [{**layer.to_dict(), "form": "loop"} for layer in LAYERS]}
    ).build()
    truth_model.load_state_dict(model.state_dict())
    h_BTD, states = truth_model.double().to(device).hidden(tokens_BT)
    truth = {f"{i}.{name}": t for i, state in enumerate(states) for name, t in state._asdict().items()}
    truth["h"] = h_BTD
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: False)
    apart = read()
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)
    for name, got in read().items():
        if not laws.differentiable(got):
            assert torch.equal(got, truth[name])
            continue
        error, bound = (laws.distance(t, truth[name], torch.linalg.vector_norm) for t in (got, apart[name]))
        assert error <= 1.25 * bound, name


@pytest.mark.compile
# torch's own, while it imports the compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("everywhere")
@torch.no_grad()
def test_what_a_compiler_traces_is_left_to_it(device: torch.device) -> None:
    """It fuses these itself; a compiled block takes and gives a stream whose last sum is left to the next."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    layer = AttentionConfig(width=16, heads=2, rotary=1.0)
    config = ModelConfig(vocab=8, width=16, layers=(layer, layer), mlp=24, mlp_kind="swiglu", norm="rms")
    model = config.build().to(device)
    tokens_BT = torch.arange(6, device=device).view(2, 3)
    want, _ = model.hidden(tokens_BT, want_states=False)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    got, _ = model.hidden(tokens_BT, want_states=False)
    torch.testing.assert_close(got, want)
    names = {
        str(node.target) for graph in graphs for node in graph.graph.nodes if "holdall" in str(node.target)
    }
    assert len(graphs) == 2  # of a stream that has been summed, and of one that has not
    assert names == {"holdall.rotary_turn.default"}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 128])
@torch.no_grad()
def test_a_recorded_step_is_the_step(
    rows: int, model: Model, device: torch.device, assert_replays: Any
) -> None:
    start = model.init_states(rows, device=device)
    token_B1 = torch.arange(rows, device=device)[:, None] % 64

    def step() -> list[torch.Tensor]:
        states = [type(state)(*(tensor.clone() for tensor in state)) for state in start]
        h_B1D, states = model.hidden(token_B1, states, inplace=True)
        return [h_B1D, *(tensor for state in states for tensor in state)]

    step()  # what is compiled and kept with the first call cannot be recorded
    assert_replays(step)
