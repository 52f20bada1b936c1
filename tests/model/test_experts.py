from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kimivl.model import Kernels, KimiVLForConditionalGeneration, experts
from kimivl.model.experts import NAMES, experts_forward, implementation, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = ["sorted", "grouped_mm"]


def plain(hidden: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The formula: every expert on every token, weighted; most weights are zero."""
    gate, up = torch.einsum("td,ejd->tej", hidden, gate_up).chunk(2, -1)
    out = torch.einsum("tei,edi->ted", F.silu(gate) * up, down)
    spread = torch.zeros(*out.shape[:2], dtype=weight.dtype).scatter(1, index, weight)
    return (out * spread.unsqueeze(-1)).sum(1)


def make(tokens: int, experts: int, top_k: int, dim: int = 16, width: int = 8, dtype: torch.dtype = torch.float32):
    """Tokens, their choice among the first two thirds of the experts (the others stay empty), weights, stacks."""
    generator = torch.Generator().manual_seed(tokens * 100 + experts * 10 + top_k)
    used = max(top_k, 2 * experts // 3)
    index = torch.rand(tokens, used, generator=generator).topk(top_k, sorted=False).indices
    hidden, weight = torch.randn(tokens, dim, generator=generator), torch.rand(tokens, top_k, generator=generator)
    gate_up = torch.randn(experts, 2 * width, dim, generator=generator) / 4
    down = torch.randn(experts, dim, width, generator=generator) / 3
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, gate_up, down)]
    return tensors[0], index, weight.requires_grad_(), *tensors[1:]


def run(kernel: str, hidden, index, weight, gate_up, down) -> Tensor:
    return experts_forward(SimpleNamespace(gate_up_proj=gate_up, down_proj=down), hidden, index, weight, kernel)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, towards)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], relative: float) -> None:
    """Every tensor to ``relative`` of the reference's largest value."""
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == reference.dtype or mine.dtype == torch.bfloat16
        scale = float(reference.detach().double().abs().max()) or 1.0
        assert float((mine.detach().double() - reference.detach().double()).abs().max()) <= relative * scale


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_equals_transformers_loop(tiny, kernel, tokens):
    experts = tiny.language_model.model.layers[1].mlp.experts
    torch.manual_seed(0)
    hidden = torch.randn(tokens, experts.hidden_dim, requires_grad=True)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])  # experts 5, 6, 7 get no token
    weight = torch.rand(tokens, 2, requires_grad=True)
    inputs = [hidden, weight, experts.gate_up_proj, experts.down_proj]

    ours = with_gradients(experts_forward(experts, hidden, index, weight, kernel), inputs)

    assert_close(ours, with_gradients(type(experts).forward.__wrapped__(experts, hidden, index, weight), inputs), 1e-5)
    assert not ours[3][5:].any() and not ours[4][5:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("experts", [2, 5, 200])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 150])
def test_is_the_formula_whatever_the_sizes(kernel, tokens, experts, top_k):
    inputs = make(tokens, experts, min(top_k, experts))
    wanted = [inputs[i] for i in (0, 2, 3, 4)]

    ours = with_gradients(run(kernel, *inputs), wanted)

    assert_close(ours, with_gradients(plain(*inputs), wanted), 1e-5)


def test_gradients_in_float64():
    hidden, index, weight, gate_up, down = make(6, 4, 2, 4, 3, torch.float64)
    weight = weight.detach().double().requires_grad_()

    def function(*tensors: Tensor) -> Tensor:
        x, w, g, d = tensors
        return run("sorted", x, index, w, g, d)

    torch.autograd.gradcheck(function, (hidden, weight, gate_up, down))


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_parameters_are_as_exact_as_transformers_loop(tiny, kernel):
    inputs = make(40, 6, 3, dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_(t.is_floating_point()) for t in inputs]
    exact[1] = inputs[1]
    wanted = (0, 2, 3, 4)
    truth = with_gradients(plain(*exact), [exact[i] for i in wanted])
    loop = type(tiny.language_model.model.layers[1].mlp.experts).forward.__wrapped__
    module = SimpleNamespace(gate_up_proj=inputs[3], down_proj=inputs[4], num_experts=6, act_fn=F.silu)

    ours = with_gradients(run(kernel, *inputs), [inputs[i] for i in wanted])
    theirs = with_gradients(loop(module, *inputs[:3]), [inputs[i] for i in wanted])

    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        error = (mine.float() - true).norm() / true.norm()
        assert error < 0.01
        assert error < 1.2 * (other.float() - true).norm() / true.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tokens_rows_are_summed_in_float32(kernel):
    """One expert a token has nothing to sum: the sums of such results are rounded to bf16 once, and so are all."""
    hidden, index, weight, *stacks = make(64, 9, 6, dtype=torch.bfloat16)
    whole = with_gradients(run(kernel, hidden, index, weight, *stacks), [hidden])
    parts = [
        with_gradients(run(kernel, hidden, index[:, k : k + 1], weight[:, k : k + 1], *stacks), [hidden])
        for k in range(6)
    ]
    for total, *terms in zip(whole, *parts, strict=True):
        once = torch.stack([term.detach().float() for term in terms]).sum(0).bfloat16()
        assert (total.detach() != once).float().mean() < 0.1  # 0.05 where ties are rounded up; in bf16 0.4


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_computes_in_its_dtype_and_gradients_keep_the_parameters_dtype(kernel):
    inputs = make(20, 4, 2)
    wanted = [inputs[i] for i in (0, 2, 3, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(run(kernel, *inputs), wanted)

    truth = with_gradients(plain(*inputs), wanted)

    assert all(tensor.dtype == torch.float32 for tensor in ours)
    assert_close(ours, truth, 0.03)
    for mine, true in zip(ours, truth, strict=True):
        with pytest.raises(AssertionError):
            assert_close([mine], [true], 1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("trains", [(0,), (2,), (3,), (4,), (0, 4)])
def test_what_is_frozen_gets_no_gradient_and_costs_the_others_nothing(kernel, trains):
    inputs = make(20, 4, 2)
    everything = with_gradients(run(kernel, *inputs), [inputs[i] for i in (0, 2, 3, 4)])[1:]
    frozen = [t.detach().requires_grad_(i in trains) for i, t in enumerate(inputs[:1])]
    frozen += [inputs[1]] + [t.detach().requires_grad_(i in trains) for i, t in enumerate(inputs[2:], 2)]

    ours = with_gradients(run(kernel, *frozen), [frozen[i] for i in trains])[1:]

    assert_close(ours, [everything[(0, 2, 3, 4).index(i)] for i in trains], 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_backward_pass_keeps_the_products_and_nothing_else_of_their_size(kernel):
    inputs = make(64, 4, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        run(kernel, *inputs)
    rows = [t for t in kept if t.dim() == 2 and len(t) == 64 * 2]
    assert [t.shape[1] for t in rows] == [16]  # (S, 2I)


def test_long_packs_go_through_grouped_mm_in_parts(monkeypatch):
    inputs = make(50, 4, 2)
    wanted = [inputs[i] for i in (0, 2, 3, 4)]
    whole = with_gradients(run("grouped_mm", *inputs), wanted)
    monkeypatch.setattr("kimivl.model.experts._GROUPED_TOKENS", 16)

    assert_close(with_gradients(run("grouped_mm", *inputs), wanted), whole, 1e-6)


def test_an_expert_without_tokens_has_no_gradient_even_if_the_kernel_leaves_it_unwritten(monkeypatch):
    inputs = make(20, 6, 2)
    real = F.grouped_mm

    def careless(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        out = real(left, right, offs=offs)
        if right.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", careless)
    gradients = with_gradients(run("grouped_mm", *inputs), [inputs[3], inputs[4]])[1:]
    assert all(not gradient[4:].any() and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_golden_case(golden, kernel):
    """The independent float64 reference, through the whole model."""
    inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "expected.safetensors")
    model = KimiVLForConditionalGeneration.from_pretrained(golden).eval()
    model.set_kernels(Kernels(experts=kernel))
    with torch.no_grad():
        logits = model(inputs["input_ids"][None], inputs["pixel_values"], inputs["image_grid_hws"]).logits[0]
    assert (logits - expected["logits"]).abs().max() < 1e-4


def test_a_model_uses_the_kernel_it_was_set_to(tiny_config, monkeypatch):
    model = KimiVLForConditionalGeneration(copy.deepcopy(tiny_config))
    assert model.language_model.model.layers[1].mlp.experts.config._experts_implementation == implementation("auto")
    calls = []
    for name in ("_Sorted", "_Grouped"):
        real = getattr(experts, name)
        spy = SimpleNamespace(apply=lambda *a, real=real, name=name: (calls.append(name), real.apply(*a))[1])
        monkeypatch.setattr(experts, name, spy)
    for choice in NAMES:
        model.set_kernels(Kernels(experts=choice))
        model(torch.arange(5)[None])
    layers = tiny_config.text_config.num_hidden_layers - 1
    assert calls == ["_Sorted"] * layers + ["_Grouped"] * layers + ["_Sorted"] * layers


def test_auto_is_grouped_where_it_is_one_kernel(monkeypatch):
    assert resolve("auto", CPU, torch.bfloat16) == "sorted"
    for capability, dtype, kernel in [
        ((9, 0), torch.bfloat16, "grouped_mm"),
        ((10, 0), torch.bfloat16, "grouped_mm"),
        ((9, 0), torch.float32, "sorted"),
        ((8, 0), torch.bfloat16, "sorted"),
        ((12, 0), torch.bfloat16, "sorted"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve("auto", CUDA, dtype) == kernel


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        (CPU, torch.float64, "float64"),
        (torch.device("mps"), torch.bfloat16, "not on mps"),
        (CUDA, torch.bfloat16, "compute capability 8.0"),
    ],
)
def test_grouped_mm_is_refused_where_it_cannot_run(monkeypatch, device, dtype, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=f"kernels.experts=grouped_mm .*{why}.*; use kernels.experts=sorted"):
        resolve("grouped_mm", device, dtype)
    assert resolve("sorted", device, dtype) == "sorted"


def test_grouped_mm_runs_on_older_devices_where_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve("grouped_mm", CUDA, torch.bfloat16) == "grouped_mm"


def test_grouped_mm_without_torchs_function(monkeypatch):
    monkeypatch.delattr(F, "grouped_mm")
    with pytest.raises(ValueError, match="needs torch 2.10"):
        resolve("grouped_mm", CPU, torch.float32)


def test_odd_widths_are_refused_by_name():
    with pytest.raises(ValueError, match="hidden_size 16 and moe_intermediate_size 6 .* multiples of 4"):
        run("grouped_mm", *make(4, 4, 2, 16, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(kernel, dtype):
    inputs = make(300, 16, 4, 64, 32)
    wanted = (0, 2, 3, 4)
    truth = with_gradients(run("sorted", *inputs), [inputs[i] for i in wanted])
    there = [t.detach().cuda() for t in inputs]
    there = [t.to(dtype) if i in (0, 3, 4) else t for i, t in enumerate(there)]
    there = [t.requires_grad_(i != 1) for i, t in enumerate(there)]
    out = run(kernel, *there)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    ours = [out, *torch.autograd.grad(out, [there[i] for i in wanted], towards)]
    assert_close([t.cpu() for t in ours], truth, 1e-5 if dtype == torch.float32 else 0.03)
    if kernel == "grouped_mm" and dtype == torch.bfloat16 and resolve("auto", there[0].device, dtype) == kernel:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(kernel, *there).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
