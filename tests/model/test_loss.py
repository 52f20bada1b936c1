"""The loss without logits: the same values and gradients as torch's own, in a fraction of the memory."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import weakref
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kimivl.model import Kernels, KimiVLForConditionalGeneration, loss
from kimivl.model.loss import chunked_log_probs, linear_log_probs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plain(hidden, weight, targets, temperature=1.0):
    return -F.cross_entropy(F.linear(hidden, weight).float() / temperature, targets, reduction="none")


def case(positions, words, width, dtype=torch.float32, seed=0, device="cpu"):
    """hidden, weight, targets, and an upstream gradient of mixed signs and a few zeros, as advantages have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator).mul_(width**-0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(0, words, (positions,), generator=generator).to(device)
    upstream = torch.randn(positions, generator=generator)
    upstream[::5] = 0
    return hidden, weight, targets, upstream.to(device)


def gradients(log_probs, inputs, upstream):
    return torch.autograd.grad(log_probs, inputs, upstream)


def assert_same(actual, expected, tolerance=1e-5):
    scale = expected.abs().max().clamp_min(1) if expected.numel() else 1
    torch.testing.assert_close(actual / scale, expected / scale, atol=tolerance, rtol=0)


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once in the tensors made inside, whoever keeps them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if not torch.is_tensor(leaf):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in before and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


# ---- equal to the plain loss ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    positions=st.integers(0, 40),
    words=st.integers(1, 300),
    width=st.integers(1, 24),
    columns=st.integers(1, 320),
    temperature=st.sampled_from([1.0, 0.3, 0.7, 2.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_loss(positions, words, width, columns, temperature, seed):
    hidden, weight, targets, upstream = case(positions, words, width, seed=seed)
    expected = plain(hidden, weight, targets, temperature)
    actual = chunked_log_probs(hidden, weight, targets, temperature, columns)
    assert actual.dtype == torch.float32
    assert_same(actual, expected)
    pairs = zip(
        gradients(actual, (hidden, weight), upstream), gradients(expected, (hidden, weight), upstream), strict=True
    )
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert_same(ours, theirs)


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_gradients_are_those_of_finite_differences(columns):
    hidden, weight, targets, _ = case(5, 9, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_log_probs(h, w, targets, 0.8, columns), (hidden, weight), atol=1e-8
    )


def test_the_block_size_does_not_change_the_gradient():
    hidden, weight, targets, upstream = case(64, 1000, 32)
    whole = gradients(chunked_log_probs(hidden, weight, targets, 1.0, 1000), (hidden, weight), upstream)
    for columns in (1, 37, 128, 999):
        blocks = gradients(chunked_log_probs(hidden, weight, targets, 1.0, columns), (hidden, weight), upstream)
        for ours, theirs in zip(blocks, whole, strict=True):
            assert_same(ours, theirs, 1e-6)


def test_large_logits_neither_overflow_nor_lose_digits():
    """Rising by 200 from one block to the next, the maximum in the first, in the last."""
    hidden = torch.ones(2, 1) * torch.tensor([[1.0], [-1.0]])
    weight = (torch.arange(12.0) * 200)[:, None]
    targets = torch.tensor([10, 1])
    torch.testing.assert_close(chunked_log_probs(hidden, weight, targets, 1.0, 2), torch.tensor([-200.0, -200.0]))


def test_a_certain_target_keeps_its_small_gradient():
    """p = 1 - 1e-6: its gradient, -1e-6, would be 0 had the probability been rounded to bf16 first, and in float32
    the difference of p and 1 is 5% off."""
    log_probs = torch.tensor([[-1e-6, -13.8155]])
    excess = loss._excess(log_probs, torch.tensor([True]), torch.tensor([[0]]), torch.bfloat16)
    assert excess[0, 0].item() == pytest.approx(-1e-6, rel=1e-2)


def test_is_deterministic():
    hidden, weight, targets, upstream = case(300, 2000, 16)
    runs = []
    for _ in range(2):
        log_probs = linear_log_probs(hidden, weight, targets)
        runs.append((log_probs.detach(), *gradients(log_probs, (hidden, weight), upstream)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# ---- precisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "autocast"),
    [
        (torch.float32, torch.float32, True),  # bf16-mixed
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),  # bf16-true
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
    ],
)
def test_every_precision_is_that_of_its_inputs(hidden_dtype, weight_dtype, autocast):
    """Only the inputs and the gradients are rounded, to their own dtype: against the loss in float64."""
    hidden, weight, targets, upstream = case(23, 150, 16)
    hidden, weight = (x.detach().to(t).requires_grad_() for x, t in ((hidden, hidden_dtype), (weight, weight_dtype)))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = -F.cross_entropy(F.linear(*exact), targets, reduction="none")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = linear_log_probs(hidden, weight, targets)
        ours = gradients(actual, (hidden, weight), upstream)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
    theirs = gradients(expected, exact, upstream.double())
    for gradient, reference, parameter in zip(ours, theirs, (hidden, weight), strict=True):
        assert gradient.dtype == parameter.dtype
        rounding = 2**-8 if parameter.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient.double(), reference, atol=1e-5, rtol=rounding)


def test_products_under_cuda_autocast_are_in_its_dtype(monkeypatch):
    """On a GPU half-precision operands are multiplied as they are; everything else is float32."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)

    def fake(dtype):
        return types.SimpleNamespace(dtype=dtype, device=CUDA)

    assert loss._product_dtype(fake(torch.float32), fake(torch.float32)) == torch.bfloat16
    assert loss._product_dtype(fake(torch.float64), fake(torch.float64)) == torch.float64
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert loss._product_dtype(fake(torch.bfloat16), fake(torch.bfloat16)) == torch.bfloat16
    assert loss._product_dtype(fake(torch.float32), fake(torch.bfloat16)) == torch.float32


def test_bf16_products_with_float32_results(monkeypatch):
    """The path of a GPU, with `aten::mm.dtype_out` computed by a float32 product."""
    monkeypatch.setattr(loss, "_product_dtype", lambda hidden, weight: torch.bfloat16)
    hidden, weight, targets, upstream = case(33, 200, 16, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = -F.cross_entropy(F.linear(*exact) / 0.7, targets, reduction="none")
    library = torch.library.Library("aten", "IMPL", "CPU")
    products = []

    def into(a, b, dtype, *, out):
        products.append(dtype)
        return out.copy_(torch.mm(a.float(), b.float()))

    library.impl("mm.dtype_out", into)
    library.impl("mm.dtype", lambda a, b, dtype: torch.mm(a.float(), b.float()))
    try:
        actual = chunked_log_probs(hidden, weight, targets, 0.7, 64)
        ours = gradients(actual, (hidden, weight), upstream)
    finally:
        library._destroy()
    assert set(products) == {torch.float32} and len(products) == 8
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
    for gradient, reference in zip(ours, gradients(expected, exact, upstream.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - reference).norm() < 2**-7 * reference.norm()


# ---- what is kept, and how much -------------------------------------------------------------------------------------


def test_peak_memory_is_below_an_eighth_of_the_logits():
    """Kimi-VL's vocabulary; forward and backward, without the gradient of the head itself (V, D)."""
    hidden, weight, targets, upstream = case(2048, 163_840, 8)
    logits = 4 * len(hidden) * len(weight)
    with LiveBytes() as live:
        linear_log_probs(hidden, weight, targets).backward(upstream)
    assert live.peak - weight.grad.nbytes < logits / 8
    assert live.peak > weight.grad.nbytes  # it does see what is allocated


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("positions", [0, 1, 2048, 8192, 32_768, 131_072])
def test_a_block_with_its_bf16_copy_is_below_an_eighth_of_the_logits(positions, device_type):
    columns = loss.block_columns(positions, 163_840, device_type)
    assert loss.NARROWEST_BLOCK <= columns <= 163_840
    if positions >= 2048:
        assert 6 * columns < 4 * 163_840 / 8
        assert 4 * positions * columns <= loss.LARGEST_BLOCK_BYTES


def test_live_bytes_sees_the_logits_of_the_plain_loss():
    hidden, weight, targets, upstream = case(256, 4096, 8)
    with LiveBytes() as live:
        plain(hidden, weight, targets).backward(upstream)
    assert live.peak > 2 * 4 * len(hidden) * len(weight)


def test_only_references_and_a_number_per_position_are_saved():
    hidden, weight, targets, _ = case(50, 600, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_log_probs(hidden, weight, targets)
    known = {hidden.data_ptr(), weight.data_ptr(), targets.data_ptr()}
    assert known <= {x.data_ptr() for x in saved}
    assert sum(x.numel() for x in saved if x.data_ptr() not in known) == len(hidden)


def test_nothing_is_saved_without_gradients():
    hidden, weight, targets, _ = case(20, 60, 8)
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        reference = linear_log_probs(hidden, weight, targets)
    assert not saved and not reference.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_log_probs(hidden, weight, targets), reference)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_costs_no_gradient(frozen):
    inputs = list(case(64, 4000, 256))
    expected = gradients(linear_log_probs(*inputs[:3]), inputs[:2], inputs[3])[1 - frozen]
    inputs[frozen] = inputs[frozen].detach()
    log_probs = linear_log_probs(*inputs[:3])
    with LiveBytes() as live:
        log_probs.backward(inputs[3])
    assert torch.equal(inputs[1 - frozen].grad, expected)
    if frozen == 1:  # LoRA: the head's gradient, 4 MB, is not made
        assert live.peak < inputs[1].nbytes


def test_no_positions_give_zero_gradients():
    hidden, weight, targets, _ = case(0, 30, 8)
    linear_log_probs(hidden, weight, targets).sum().backward()
    assert hidden.grad.shape == (0, 8) and weight.grad.shape == (30, 8) and not weight.grad.any()


def test_on_the_meta_device_shapes_are_known_and_nothing_is_computed():
    hidden, weight, targets, _ = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in case(5, 700, 4))
    log_probs = linear_log_probs(hidden, weight, targets)
    log_probs.sum().backward()
    assert log_probs.shape == (5,) and weight.grad.shape == (700, 4) and weight.grad.is_meta


# ---- in a graph -----------------------------------------------------------------------------------------------------


def test_two_losses_and_two_backward_passes():
    hidden, weight, targets, upstream = case(12, 90, 8)
    other = targets.flip(0)
    total = (linear_log_probs(hidden, weight, targets) * upstream).sum() + linear_log_probs(hidden, weight, other).sum()
    expected = (plain(hidden, weight, targets) * upstream).sum() + plain(hidden, weight, other).sum()
    total.backward(retain_graph=True)
    total.backward()
    for ours, theirs in zip((hidden.grad, weight.grad), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert_same(ours / 2, theirs)


def test_inside_a_checkpoint():
    hidden, weight, targets, upstream = case(12, 90, 8)
    expected = gradients(linear_log_probs(hidden, weight, targets), (hidden, weight), upstream)
    recomputed = checkpoint(linear_log_probs, hidden, weight, targets, 1.0, use_reentrant=False)
    for ours, theirs in zip(gradients(recomputed, (hidden, weight), upstream), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused():
    hidden, weight, targets, _ = case(4, 9, 3)
    upstream = torch.ones(4, requires_grad=True)
    (first,) = torch.autograd.grad(linear_log_probs(hidden, weight, targets), hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_strided_inputs():
    hidden, weight, targets, upstream = case(24, 80, 8)
    views = hidden.detach()[::2].t().contiguous().t().requires_grad_(), weight.detach()[::2].requires_grad_()
    targets = targets[::2] // 2
    actual, expected = (f(*views, targets) for f in (linear_log_probs, plain))
    assert_same(actual, expected)
    pairs = zip(gradients(actual, views, upstream[::2]), gradients(expected, views, upstream[::2]), strict=True)
    for ours, theirs in pairs:
        assert_same(ours, theirs)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_refusals_name_what_is_wrong():
    hidden, weight, targets, _ = case(6, 20, 4)
    for bad in (-100, 20):
        with pytest.raises(ValueError, match=rf"targets\[3\] = {bad} is outside the 20 words"):
            linear_log_probs(hidden, weight, targets.clone().index_fill_(0, torch.tensor([3]), bad))
    with pytest.raises(ValueError, match=r"\(6, 4\), \(20, 3\) and \(6,\)"):
        linear_log_probs(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"select the supervised positions"):
        linear_log_probs(hidden[None], weight, targets[None])
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature {bad}"):
            linear_log_probs(hidden, weight, targets, bad)


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_auto_is_chunked_everywhere():
    for device in (CPU, CUDA):
        for dtype in (torch.float32, torch.bfloat16):
            assert loss.resolve("auto", device, dtype) == loss.resolve("chunked", device, dtype) == "chunked"


@pytest.mark.parametrize(
    ("installed", "accepted"),
    [(None, False), ("0.8.1", False), ("0.7.9", False), ("0.8.2", True), ("0.8.5.dev1", True), ("1.0rc1", True)],
)
def test_liger_needs_a_version_whose_gradients_are_right(monkeypatch, installed, accepted):
    monkeypatch.setattr(loss, "_liger_version", lambda: installed)
    if accepted:
        assert loss.resolve("liger", CUDA, torch.bfloat16) == "liger"
        return
    with pytest.raises(
        ValueError, match=r"needs liger-kernel 0\.8\.2 or newer .* or use kernels\.loss=chunked"
    ) as error:
        loss.resolve("liger", CUDA, torch.bfloat16)
    assert "\n" not in str(error.value) and (installed or "not installed") in str(error.value)


def test_liger_is_refused_where_it_does_not_run():
    with pytest.raises(ValueError, match=r"kernels\.loss=liger runs on CUDA devices, not on cpu: use kernels\.loss"):
        linear_log_probs(*case(2, 9, 3)[:3], kernel="liger")
    with pytest.raises(ValueError, match="no float64"):
        loss.resolve("liger", CUDA, torch.float64)
    with pytest.raises(ValueError, match=r"kernels\.loss=cce: choose one of auto, chunked, liger"):
        Kernels(loss="cce")


def test_liger_is_asked_for_log_probabilities_of_single_tokens(monkeypatch):
    """Sign, temperature and dtypes around the call, with a plain loss in liger's place."""

    def fused(hidden, weight, targets, *, reduction, accum_dtype):
        assert accum_dtype == torch.float32 and hidden.dtype == weight.dtype
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction=reduction)

    module = types.SimpleNamespace(liger_fused_linear_cross_entropy=fused)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, module)
    hidden, weight, targets, _ = case(12, 90, 8)
    assert_same(loss._liger_log_probs(hidden, weight, targets, 0.7), plain(hidden, weight, targets, 0.7))
    halved = loss._liger_log_probs(hidden, weight.bfloat16(), targets, 1.0)
    assert_same(halved, plain(hidden.bfloat16(), weight.bfloat16(), targets))


INTERPRETED = """
import torch
from tests.model.test_loss import case, gradients, loss, plain
hidden, weight, targets, upstream = case(37, 300, 64)
for temperature in (1.0, 0.7):
    actual = loss._liger_log_probs(hidden, weight, targets, temperature)
    expected = plain(hidden, weight, targets, temperature)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(*(gradients(x, (hidden, weight), upstream) for x in (actual, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
"""


def _has_liger():
    try:
        return loss._release(version("liger-kernel")) >= loss.LIGER
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not _has_liger(), reason="needs liger-kernel (pip install 'kimivl[liger]')")
def test_liger_equals_the_plain_loss_in_tritons_interpreter():
    """Its real code, on the CPU; float32, an upstream gradient that differs from token to token."""
    script = INTERPRETED
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr and "triton/runtime/interpreter" in done.stderr:
        pytest.skip("this triton's interpreter does not run under this numpy (triton 3.6 under numpy 2.4)")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["chunked", "liger"])
def test_on_a_gpu(kernel, dtype):
    if kernel == "liger" and not _has_liger():
        pytest.skip("needs liger-kernel (pip install 'kimivl[liger]')")
    hidden, weight, targets, upstream = case(300, 5000, 64, dtype, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = -F.cross_entropy(F.linear(*exact), targets, reduction="none")
    actual = linear_log_probs(hidden, weight, targets, kernel=kernel)
    rounded = kernel == "liger" and dtype == torch.bfloat16  # it rounds the logits
    torch.testing.assert_close(actual.double(), expected, atol=5e-2 if rounded else 1e-5, rtol=0)
    ours, theirs = gradients(actual, (hidden, weight), upstream), gradients(expected, exact, upstream.double())
    for gradient, reference in zip(ours, theirs, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - reference).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * reference.norm()


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    hidden, weight, targets, upstream = case(4096, 163_840, 64, torch.bfloat16, device="cuda")
    weight.grad = torch.zeros_like(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_log_probs(hidden, weight, targets).backward(upstream)
    assert torch.cuda.max_memory_allocated() - before - weight.nbytes < 4 * 4096 * 163_840 / 8


# ---- the golden case ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
def test_golden_log_probs(golden, kernel, temperature):
    """Log-probabilities of the next tokens, from the logits of an independent float64 reference."""
    model = KimiVLForConditionalGeneration.from_pretrained(golden).eval()
    model.set_kernels(Kernels(loss=kernel))
    inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "expected.safetensors")
    ids = inputs["input_ids"]
    targets = ids.roll(-1).index_fill(0, torch.tensor([4, len(ids) - 1]), -100)
    packed = torch.tensor([0, len(ids)], dtype=torch.int32)
    actual = model.target_log_probs(ids, targets, packed, inputs["pixel_values"], inputs["image_grid_hws"], temperature)
    chosen = targets != -100
    logits = expected["logits"].double() / temperature
    reference = logits.log_softmax(-1)[chosen].gather(1, targets[chosen, None])[:, 0]
    assert len(actual) == len(ids) - 2
    assert (actual - reference).abs().max() < 1e-4
