"""flash-linear-attention behind our operations' signatures is our loops: values, gradients, every transform.

On a CPU its own kernels run in Triton's interpreter, so what is passed to them is checked here too. On a GPU
they compile for seconds: shapes are few.

Letters: B row, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernel_checks
import pytest
import torch
from torch import Tensor

from holdall.testing import laws

pytest.importorskip("fla", reason="needs fla-core")

import holdall
from holdall.contract import forms
from holdall.contract.forms import KernelError
from holdall.kernels import delta_rule as kernels_delta
from holdall.kernels import fla
from holdall.kernels import linear_attention as kernels_linear
from holdall.kernels import wkv as kernels_wkv
from holdall.ops import delta_rule as ops_delta
from holdall.ops import linear_attention as ops_linear
from holdall.ops import wkv as ops_wkv

DOUBLE, SINGLE, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
gpu = pytest.mark.gpu
# pairs of which the mask drops one may overflow before; only the interpreter tells
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def first_two(function: Callable) -> Callable:
    """Linear attention without its normaliser, which is None."""
    return lambda *tensors, **how: function(*tensors[:4], None, *tensors[4:], **how)[:2]


LINEAR = tuple(
    map(
        first_two,
        (
            kernels_linear.linear_attention,
            ops_linear.linear_attention,
            ops_linear.linear_attention_loop,
        ),
    )
)
DELTA = (kernels_delta.delta_rule, ops_delta.delta_rule, ops_delta.delta_rule_loop)
GENERALISED = (
    kernels_delta.generalised_delta_rule,
    ops_delta.generalised_delta_rule,
    ops_delta.generalised_delta_rule_loop,
)
RULES: dict[str, tuple[tuple[Callable, ...], str]] = {
    "no decay": (LINEAR, ""),
    "decay per head": (LINEAR, "head"),
    "decay per key": (LINEAR, "key"),
    "delta": (DELTA, ""),
    "delta, decay per head": (DELTA, "head"),
    "delta, decay per key": (DELTA, "key"),
    "generalised delta": (GENERALISED, "key"),
}


def every_rule_as(group: str) -> pytest.MarkDecorator:
    """All rules; those of a group run the same kernels."""
    return pytest.mark.parametrize(
        "rule", [pytest.param(rule, marks=pytest.mark.xdist_group(rule + group)) for rule in RULES]
    )


every_rule, every_rule_large = every_rule_as(", small"), every_rule_as(", large")
LARGE: dict[str, Any] = {"rows": 2, "heads": 16, "dims": (64, 64), "dtype": BF16}
"""As a language model's layer."""
STATE = {LINEAR: 3, DELTA: 4, GENERALISED: 5}
"""Where the state stands among the arguments."""


def inputs(
    rule: str,
    length: int,
    device: torch.device,
    *,
    rows: int = 1,
    heads: int = 1,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = SINGLE,
    forget: float = 1.0,
) -> list[Tensor]:
    """The arguments of a rule, in order: keys of unit length, beta up to 2, a state as after a few tokens."""
    functions, decay = RULES[rule]
    key_dim, value_dim = dims

    def draw(*shape: int, seed: int) -> Tensor:
        return laws.draw(rows, length, heads, *shape, dtype=SINGLE, seed=seed)

    q, k, other = draw(key_dim, seed=0), ops_delta.unit_length(draw(key_dim, seed=1)), draw(key_dim, seed=2)
    other = key_dim**-0.5 * other
    v, s = draw(value_dim, seed=3), laws.draw(rows, heads, key_dim, value_dim, dtype=SINGLE, seed=4)
    share = draw(seed=5).sigmoid()
    found = {
        LINEAR: [q, k, v, s],
        DELTA: [q, k, v, 2 * share, s],
        GENERALISED: [q, other, v, 0.2 * other - share[..., None] * k, k, s],
    }[functions]
    activations = {LINEAR: 3, DELTA: 3, GENERALISED: 5}[functions]
    if decay:
        found.append(-forget * draw(*{"head": (), "key": (key_dim,)}[decay], seed=6).sigmoid())
    return [x.to(device, dtype if i < activations else SINGLE) for i, x in enumerate(found)]


def pulled_back(function: Callable, tensors: list[Tensor], results: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    """Output and final state, and the gradients of all inputs from both (or one of them)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = list(function(*leaves))
    ups = [laws.draw(*x.shape, dtype=SINGLE, seed=20 + i).to(x) for i, x in enumerate(found)]
    grads = torch.autograd.grad(
        [found[i] for i in results], leaves, [ups[i] for i in results], materialize_grads=True
    )
    return [x.detach() for x in (*found, *grads)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """The largest difference of each tensor, in shares of the right tensor's largest entry."""
    return [
        laws.distance(x, right.to(x.device)) / max(laws.size(right), 1e-30)
        for x, right in zip(got, want, strict=True)
    ]


SLACK = {SINGLE: 2.0**-17, FP16: 2.0**-7, BF16: 2.0**-4}
"""What the package may be off by, of the largest entry: what it keeps between kernels it rounds to the dtype
of the inputs, where our plain form computes in fp32 throughout."""


def check(rule: str, tensors: list[Tensor], results: tuple[int, ...] = (0, 1)) -> None:
    kernel, plain, loop = RULES[rule][0]
    dtype = tensors[0].dtype
    got, twin = pulled_back(kernel, tensors, results), pulled_back(plain, tensors, results)
    truth = pulled_back(loop, [x.double() for x in tensors], results)
    for i, (x, y) in enumerate(zip(got, twin, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"result or gradient {i}"
    ours, theirs = errors(twin, truth), errors(got, truth)
    for i, (error, plain_error) in enumerate(zip(theirs, ours, strict=True)):
        bound = max(SLACK[dtype], 2 * plain_error)
        assert error <= bound, f"result or gradient {i} is off by {error:.2g}, plain by {plain_error:.2g}"


@every_rule
@pytest.mark.parametrize("length", [1, 65])
def test_a_rule_is_its_loop(rule: str, length: int, device: torch.device) -> None:
    check(rule, inputs(rule, length, device))


@gpu
@every_rule_large
@pytest.mark.parametrize(("length", "dtype"), [*((n, BF16) for n in (1, 63, 64, 65, 1000)), (65, FP16)])
def test_a_rule_is_its_loop_in_16_bits(
    rule: str, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(rule, inputs(rule, length, device, **LARGE | {"dtype": dtype}))


@gpu
@every_rule
def test_a_thousand_tokens_in_fp32(rule: str, device: torch.device) -> None:
    check(rule, inputs(rule, 1000, device, rows=2))


@every_rule
def test_dimensions_that_it_does_not_take_are_filled_up(rule: str, device: torch.device) -> None:
    low = FP16 if device.type == "cpu" else BF16  # these kernels' bf16 is not the interpreter's
    check(rule, inputs(rule, 5, device, dims=(8, 24), dtype=low))


@gpu
@every_rule_large
def test_dimensions_of_several_blocks(rule: str, device: torch.device) -> None:
    check(rule, inputs(rule, 100, device, heads=2, dims=(128, 256), dtype=BF16))


@gpu
@every_rule_large
def test_a_long_text_in_bf16(rule: str, device: torch.device) -> None:
    """Against our plain form in fp64: a loop over 16,384 tokens would take minutes."""
    tensors = inputs(rule, 16384, device, **LARGE | {"rows": 1})
    kernel, plain, _ = RULES[rule][0]
    truth = pulled_back(plain, [x.double() for x in tensors])
    assert max(errors(pulled_back(kernel, tensors), truth)) < SLACK[BF16]


@pytest.mark.parametrize("rule", [rule for rule, (_, decay) in RULES.items() if decay])
def test_a_rule_whatever_it_forgets(rule: str, device: torch.device) -> None:
    """Over two chunks. Decays between tokens are off by what holdall/kernels/fla.py says, and no more."""
    (kernel, plain, loop), decay = RULES[rule]
    differences = rule == "generalised delta"
    chunk = 16 if differences else fla.CHUNK
    *tensors, log_decay = inputs(rule, chunk + 2, device, heads=4 if decay == "head" else 1)
    tensors.append(kernel_checks.strengths(*log_decay.shape).to(device))
    got, twin = pulled_back(kernel, tensors), laws.plainly(pulled_back, plain, tensors)
    truth = pulled_back(loop, [x.double() for x in tensors])
    mixed = tensors[-1][0, :chunk].sum(0).abs().flatten()[3::4]  # where much is forgotten and something kept
    lost = fla.LOST_PER_NAT * mixed.max().item()
    names = ("y", "state", *(f"gradient of argument {i}" for i in range(len(tensors))))
    for name, mine, other, right in zip(names[:-1], got, twin, truth, strict=False):
        allowed = lost * laws.size(right)
        laws.assert_close(name, mine.double(), right, (each + allowed for each in laws.earned(other, right)))
    dim = 2 if decay == "head" else 3
    error, earned = (kernel_checks.apart(each, truth[-1], dim) for each in (got[-1], twin[-1].tensor))
    bound = 2 * earned + 4 * torch.finfo(SINGLE).eps + lost
    if differences:  # of sums like this one, which nothing decays
        size = laws.size(truth[2] * tensors[0].double())
        error, bound = (got[-1].double() - truth[-1]).abs() / size, torch.tensor(lost)
    assert (error <= bound).all(), f"decays: off by {error.max()}, where {bound} is explained"


@every_rule
@pytest.mark.parametrize("results", [(0,), (1,)], ids=["output", "state"])
def test_gradients_from_one_result_alone(rule: str, results: tuple[int, ...], device: torch.device) -> None:
    check(rule, inputs(rule, 5, device), results)


def test_without_an_incoming_or_a_final_state(device: torch.device) -> None:
    q, k, v, s, log_a = inputs("decay per head", 20, device)
    for decay in (None, log_a):
        y, after, z = kernels_linear.linear_attention(q, k, v, None, None, decay, want_state=False)
        assert after is None
        assert z is None
        want, _, _ = kernels_linear.linear_attention(q, k, v, torch.zeros_like(s), None, decay)
        laws.assert_bitwise("output", y, want)


@every_rule
def test_members_of_a_population_are_rows_of_a_larger_batch(rule: str, device: torch.device) -> None:
    kernel = RULES[rule][0][0]
    stacked = inputs(rule, 5, device, rows=2)
    members = [x.unflatten(0, (2, 1)) for x in stacked]

    got = pulled_back(lambda *own: map(lambda x: x.flatten(0, 1), torch.func.vmap(kernel)(*own)), members)
    for x, right in zip(got, pulled_back(kernel, stacked), strict=True):
        laws.assert_bitwise("result or gradient", x.reshape(right.shape), right)


def test_members_share_what_is_not_their_own(device: torch.device) -> None:
    kernel, tensors = RULES["delta"][0][0], inputs("delta", 5, device)
    q = torch.stack((tensors[0], -tensors[0]))
    y, _ = torch.func.vmap(kernel, in_dims=(0, *(None,) * (len(tensors) - 1)))(q, *tensors[1:])
    laws.assert_bitwise("second member", y[1], kernel(q[1], *tensors[1:])[0])


def test_several_gradients_at_once(device: torch.device) -> None:
    q, *rest = inputs("decay per head", 5, device)
    y, _ = RULES["decay per head"][0][0](q.requires_grad_(), *rest)
    ups = torch.stack((torch.ones_like(y), y.detach()))
    both = torch.autograd.grad(y, q, ups, is_grads_batched=True, retain_graph=True)[0]
    for i in range(2):
        laws.assert_bitwise(f"gradient {i}", both[i], torch.autograd.grad(y, q, ups[i], retain_graph=True)[0])


@every_rule
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_it_is_the_same(rule: str, device: torch.device) -> None:
    kernel = RULES[rule][0][0]
    tensors = inputs(rule, 5, device, dims=(8, 16))
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for x, right in zip(pulled_back(compiled, tensors), pulled_back(kernel, tensors), strict=True):
        laws.assert_bitwise("result or gradient", x, right)


@every_rule
def test_the_same_bits_twice_whatever_lay_in_memory(rule: str, device: torch.device) -> None:
    """Deterministic mode fills new tensors with NaN."""
    tensors = inputs(rule, 10, device)
    once = pulled_back(RULES[rule][0][0], tensors)
    torch.use_deterministic_algorithms(True)
    try:
        twice = pulled_back(RULES[rule][0][0], tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(once, twice, strict=True):
        assert x.isfinite().all()
        laws.assert_bitwise("result or gradient", x, y)


@every_rule
def test_beside_autocast(rule: str, device: torch.device) -> None:
    low = FP16 if device.type == "cpu" else BF16
    tensors = inputs(rule, 5, device, dims=(8, 24), dtype=low)
    want = pulled_back(RULES[rule][0][0], tensors)
    with torch.autocast(device.type, dtype=low):
        got = pulled_back(RULES[rule][0][0], tensors)
    for x, y in zip(got, want, strict=True):
        laws.assert_bitwise("result or gradient", x, y)


@gpu
@every_rule_large
def test_captured_in_a_graph(rule: str, device: torch.device) -> None:
    kernel = RULES[rule][0][0]
    tensors = inputs(rule, 100, device, **LARGE)

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]  # of the stream that it runs on
        y, s = kernel(*leaves)
        return [y, s, *torch.autograd.grad((y.float().sum() + s.sum()), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            want = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    for x, right in zip(found, want, strict=True):
        laws.assert_bitwise("result or gradient", x, right)


@gpu
@every_rule_large
def test_another_length_compiles_nothing(rule: str, device: torch.device) -> None:
    """Once there was one of each kind: a single token, a multiple of 16, any other."""
    from triton import knobs

    kernel = RULES[rule][0][0]
    compiled: list[str] = []
    for length in (1, 64, 65):
        pulled_back(kernel, inputs(rule, length, device, **LARGE))
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: compiled.append(fn.name)
        for length in (2, 16, 63, 100, 1000, 1024):
            pulled_back(kernel, inputs(rule, length, device, **LARGE))
    assert not compiled


@gpu
@pytest.mark.parametrize("rule", ["decay per head", "delta"])
def test_offsets_beyond_32_bits(rule: str, device: torch.device) -> None:
    """The end of a tensor of more than 2^31 elements, against the same tokens behind a state like its own."""
    kernel, size, tail = RULES[rule][0][0], 2**20 + 2**17, 512
    tensors = inputs(rule, 1024, device, heads=32, dims=(64, 64), dtype=BF16, forget=0.1)
    place = STATE[RULES[rule][0]]
    state, repeats = tensors[place], size // 1024
    with torch.no_grad():
        whole = [
            x if i == place else x.repeat(1, repeats, *(1,) * (x.ndim - 2)) for i, x in enumerate(tensors)
        ]
        assert whole[0].numel() > 2**31
        y, _ = kernel(*whole)
        # twice from a state of before: after thousands of tokens it does not matter which
        _, state = kernel(*(x if i == place else x[:, :2048] for i, x in enumerate(whole)))
        tensors[place] = state
        want, _ = kernel(*tensors)
    assert laws.distance(y[:, -tail:], want[:, -tail:]) < 0.02 * laws.size(want)


# ----------------------------------------------------------------------------------------- RWKV-5's attention


@pytest.mark.parametrize("w", [-0.05, pytest.param(-1.0, marks=pytest.mark.full), -50.0])
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, SINGLE), (65, SINGLE), *(pytest.param(n, t, marks=gpu) for n in (63, 1000) for t in (SINGLE, BF16))],
)
def test_a_past_that_fades_at_a_fixed_rate(
    length: int, dtype: torch.dtype, w: float, device: torch.device
) -> None:
    """With a bonus for the present, and however fast it fades.

    In 16 bits the gradient of w is a difference of two sums, with their rounding: see holdall/kernels/fla.py.
    """
    r, k, v, s = inputs("no decay", length, device, rows=2, heads=2, dtype=dtype)
    fade = w * (0.5 + torch.rand(2, 16, generator=torch.Generator().manual_seed(7))).to(device)
    tensors = [r, k, v, fade, torch.linspace(-1, 1, 32, device=device).view(2, 16), s]
    got, twin = (pulled_back(each.matrix_wkv, tensors) for each in (kernels_wkv, ops_wkv))
    truth = pulled_back(ops_wkv.matrix_wkv_loop, [x.double() for x in tensors])
    for i, (x, y) in enumerate(zip(got, twin, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"result or gradient {i}"
    names = ("y", "state", *(f"gradient of {name}" for name in ("r", "k", "v", "w", "u", "state")))
    for name, x, y, right in zip(names, got, twin, truth, strict=True):
        bound = max(SLACK[dtype] * laws.size(right), 2 * laws.distance(y, right))
        if name == "gradient of w" and dtype == BF16:
            bound += SLACK[SINGLE] * laws.size((r.double() * truth[2]).abs().sum((0, 1)))
        laws.assert_close(name, x.double(), right, bound)


# ------------------------------------------------------------------------------------------------- the mixers


MIXERS: dict[str, dict[str, Any]] = {
    "retnet": {"heads": 1, "value_ratio": 1},
    "gla": {"heads": 1},
    "delta-net": {"heads": 1},
    "gated-delta-net": {"heads": 1, "value_ratio": 1},
    "kimi-delta-attention": {"heads": 1},
    "rwkv-5": {},
    "rwkv-7": {"heads": 1},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*MIXERS.items(), ("rwkv-7", {"heads": 1, "value_rank": 3, "key_eps": 0.01})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_mixer_in_its_kernel_form(name: str, options: dict[str, Any], device: torch.device) -> None:
    """From a state, in two pieces: outputs, final state and all gradients are the loop's in fp64."""
    mixer = laws.build(holdall.describe(name).configure(width=16, form="kernel", **options)).to(device)
    assert mixer.form == "kernel"
    plain, loop = (laws.loop_of(mixer, dtype).to(device) for dtype in (SINGLE, DOUBLE))
    x_BTD = laws.tokens(mixer, 5).to(device)
    with torch.no_grad():
        _, state = plain(laws.tokens(mixer, 3, seed=1).to(device))
    got, twin = (kernel_checks.mixer_pulled_back(each, x_BTD, state, 3) for each in (mixer, plain))
    for part, right in kernel_checks.mixer_pulled_back(loop, x_BTD.double(), laws.widened(state), 3).items():
        assert got[part].dtype == twin[part].dtype
        bound = 2 * laws.distance(twin[part], right) + SLACK[SINGLE] * laws.size(right)
        laws.assert_close(part, got[part].double(), right, bound)


@pytest.mark.parametrize("name", MIXERS)
def test_auto_takes_it_on_a_gpu_where_it_is_known_good(name: str, installed: Callable[[str], None]) -> None:
    config = holdall.describe(name).configure(width=16, **MIXERS[name])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (config.resolved_form(cuda), config.resolved_form(cpu)) == ("kernel", "parallel")
    assert config.resolved_form(cuda, DOUBLE) == "parallel"
    installed("")
    assert config.resolved_form(cuda) == "parallel"
    with forms.strict(), pytest.raises(KernelError, match=r'pip install "fla-core==0.6.0"'):
        config.resolved_form(cuda)


# -------------------------------------------------------------------------------------------- what it refuses


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes believe that another version, or none, is installed."""
    return lambda version: monkeypatch.setattr(fla, "VERSION", version)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("", r'flash-linear-attention is not installed \(pip install "fla-core==0.6.0"\)'),
        ("0.7.1", r"fla-core 0.7.1 has not been tested against our loops, 0.6.0 has"),
    ],
)
def test_a_version_that_was_not_checked_is_refused(
    version: str, says: str, installed: Callable[[str], None], device: torch.device
) -> None:
    installed(version)
    for rule, ((kernel, *_), _) in RULES.items():
        with pytest.raises(KernelError, match=says):
            kernel(*inputs(rule, 2, device))


def test_what_it_has_not_is_refused_by_name(device: torch.device) -> None:
    q, k, v, s = inputs("no decay", 2, device)
    kernel = kernels_linear.linear_attention
    for how in ({"normalise": True}, {"feature_map": ops_linear.FEATURE_MAPS["elu1"]}):
        with pytest.raises(KernelError, match="no feature maps and no normaliser"):
            kernel(q, k, v, s, **how)
    with pytest.raises(KernelError, match="not float64"):
        kernel(*(x.double() for x in (q, k, v, s)))
    for rule in ("decay per key", "delta"):
        with pytest.raises(KernelError, match="up to 256 key dimensions here, not 257"):
            RULES[rule][0][0](*inputs(rule, 2, device, dims=(257, 16)))


def test_each_kernel_has_one_configuration(device: torch.device) -> None:
    from triton.runtime.autotuner import Autotuner

    for rule in RULES:
        pulled_back(RULES[rule][0][0], inputs(rule, 2, device))
    for name in ("ops.common.fused_chunk", "ops.gla.chunk", "ops.common.chunk_delta_h"):
        for kernel in vars(fla.load(name)).values():
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    assert len(kernel.configs) == 1, kernel.base_fn.__name__
                kernel = kernel.fn


@pytest.mark.parametrize(
    ("release", "hopper", "broken"),
    [("3.3.1", True, False), ("3.4.0", True, True), ("3.5.1", True, True), ("3.6.0", True, False),
     ("3.7.0", True, True), ("3.7.1", True, False), ("3.5.1", False, False)],
)  # fmt: skip
def test_where_triton_would_mistranslate_is_known(
    release: str, hopper: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", release)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if hopper else (10, 0))
    assert fla.per_head_is_broken() == broken


@pytest.mark.parametrize("broken", [False, True])
def test_a_decay_per_head_where_its_kernel_is_broken(
    broken: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(fla, "per_head_is_broken", lambda: broken)
    used: list[str] = []
    plain = fla.apply
    monkeypatch.setattr(fla, "apply", lambda rule, *rest: (used.append(rule), plain(rule, *rest))[1])
    check("delta, decay per head", inputs("delta, decay per head", 5, device))
    if device.type == "cuda":
        for length, dims in ((1, (64, 64)), (63, (64, 128)), (65, (128, 256)), (1000, (64, 128))):
            large = LARGE | {"heads": 2, "dims": dims}
            check("delta, decay per head", inputs("delta, decay per head", length, device, **large))
    assert set(used) == {f"delta, decay per {'key' if broken else 'head'}"}
