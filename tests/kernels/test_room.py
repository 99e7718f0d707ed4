"""Steps of kernels in place: states keep their addresses, and small states are not copied either."""

import inspect

import pytest
import torch

import holdall
from holdall.testing import laws


@torch.no_grad()
@pytest.mark.parametrize("name", ["base-conv", "hyena", "mamba", "mamba-2", "sliding-window", "taylor"])
def test_with_a_capacity_and_in_place_states_stay_where_they_are(name: str, device: torch.device) -> None:
    with torch.device(device):
        mixer = holdall.build(name, width=16, form="kernel")
    x_BTD = laws.draw(2, 9, 16, dtype=torch.float32).to(device)
    state = mixer.init_state(2, dtype=torch.float32, device=device, capacity=9)
    y_BTD, _ = laws.in_place(mixer, x_BTD, [1, 1, 4, 1, 2], state, fixed=True)
    want_BTD, _ = laws.loop_of(mixer, torch.float64)(x_BTD.cpu().double())
    torch.testing.assert_close(y_BTD.cpu().double(), want_BTD, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fields"),
    [("mamba", ("conv_BPE", "h_BEN")), ("hyena", ("short_BPU",)), ("base-conv", ("past_BPD",)),
     ("sliding-window", ("k_BSHK", "v_BSHV"))],
)  # fmt: skip
def test_one_token_is_written_into_the_state_by_its_kernel(
    name: str, fields: tuple[str, ...], device: torch.device
) -> None:
    with torch.device(device):
        mixer = holdall.build(name, width=16, form="kernel")
    state = mixer.init_state(2, dtype=torch.float32, device=device)
    x_BTD = laws.draw(2, 1, 16, dtype=torch.float32).to(device)
    _, after = inspect.unwrap(type(mixer).forward)(mixer, x_BTD, state, inplace=True)
    for field in fields:
        assert getattr(after, field) is getattr(state, field), field
