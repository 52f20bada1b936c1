"""Every attention kernel against a plain dense mask, and the choice between them.

The kernels of a GPU run on stand-ins that compute on a CPU, so that what is around them is the real thing; the tests
marked gpu run the real kernels.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from attention_reference import dense_attention, flash_package
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from kimivl.model import segment_attention as attention
from kimivl.model.segment_attention import resolve, segment_attention
from kimivl.model.segments import Segments

LENGTHS = [3, 40, 1, 17, 17, 5, 90, 2]
WIDTHS = [(24, 24), (24, 16), (12, 6), (72, 72)]
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def inputs(tokens, width, value_width, dtype=torch.float32, device="cpu", heads=2, requires_grad=True):
    """q as transformers lays it out, k on its own, v a slice: the strides that the model passes."""
    torch.manual_seed(0)
    q = torch.randn(heads, tokens, width, dtype=dtype, device=device).transpose(0, 1)
    k = torch.randn(tokens, heads, width, dtype=dtype, device=device)
    v = torch.randn(tokens, heads, 5 + value_width, dtype=dtype, device=device)[..., 5:]
    return [x.requires_grad_(requires_grad) for x in (q, k, v)]


def with_gradients(function, qkv):
    out = function(*qkv)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def assert_equals_dense(qkv, lengths, causal, kernel, scale=0.3, **tolerance):
    segments = Segments.of_lengths(lengths, qkv[0].device)
    ours = with_gradients(lambda q, k, v: segment_attention(q, k, v, segments, scale, causal, kernel), qkv)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, lengths, scale, causal), qkv)
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, dense, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [11], [1]])
@pytest.mark.parametrize("kernel", ["auto", "sdpa"])
def test_sdpa_equals_dense(kernel, lengths, widths, causal):
    assert_equals_dense(inputs(sum(lengths), *widths, dtype=torch.float64), lengths, causal, kernel)
    assert_equals_dense(inputs(sum(lengths), *widths), lengths, causal, kernel, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", [(24, 24), (24, 16)])
def test_sdpa_of_other_devices_equals_dense(widths, causal):
    """Run on a CPU: they have torch's own gradients in the place of ours."""
    qkv = inputs(sum(LENGTHS), *widths, dtype=torch.float64)
    runs = Segments.of_lengths(LENGTHS, "cpu").runs
    ours = with_gradients(lambda q, k, v: attention._per_run_by_autograd(q, k, v, runs, 0.3, causal), qkv)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, LENGTHS, 0.3, causal), qkv)
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.booleans(), st.sampled_from(WIDTHS))
def test_sdpa_of_any_lengths(lengths, causal, widths):
    assert_equals_dense(inputs(sum(lengths), *widths, dtype=torch.float64), lengths, causal, "sdpa")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("stand_in", ["varlen", "flash_2", "flash_3"], indirect=True)
def test_gpu_kernels_are_called_rightly(stand_in, widths, causal):
    assert_equals_dense(inputs(sum(LENGTHS), *widths, dtype=torch.float64), LENGTHS, causal, stand_in)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_dense(widths, causal):
    for lengths in (LENGTHS, [300], [128, 128, 2]):
        q, k, v = inputs(sum(lengths), *widths, requires_grad=False)
        out = segment_attention(q, k, v, Segments.of_lengths(lengths, "cpu"), 0.3, causal, "flex")
        torch.testing.assert_close(out, dense_attention(q, k, v, lengths, 0.3, causal), atol=1e-5, rtol=1e-4)


def test_flex_gets_no_width_below_what_it_takes(monkeypatch):
    shapes = []

    def attend(*rows, block_mask):
        shapes.extend(row.shape[-1] for row in rows)
        return rows[2]

    monkeypatch.setattr(attention, "_flex_function", lambda compiled: attend)
    for width, value_width in ((12, 6), (24, 6), (24, 16)):
        segments = Segments.of_lengths([8], "cpu")
        out = attention._flex(*inputs(8, width, value_width, requires_grad=False), segments, 1.0, True)
        assert out.shape[-1] == value_width
    assert shapes == [16, 16, 16, 32, 32, 32, 24, 24, 16]


def test_flex_without_gradients_on_a_cpu():
    qkv = inputs(8, 16, 16)
    with pytest.raises(ValueError, match="kernels.attention=flex has no gradients on a CPU; use sdpa, or auto"):
        segment_attention(*qkv, Segments.of_lengths([8], "cpu"), 1.0, True, "flex")


@pytest.mark.slow
def test_flex_is_compiled_for_any_length():
    """Heads and widths are constants of a graph, lengths are not."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")  # what the compiler sees is the same with a GPU's backend
    compiled = attention._flex_function(True, graphs)
    count = []
    for lengths in ([300, 20], [128, 700], [1000, 3], [37] * 7, [640]):
        segments = Segments.of_lengths(lengths, "cpu")
        for heads, width, value_width, causal in ((4, 32, 16, True), (2, 24, 24, False)):
            qkv = inputs(sum(lengths), width, value_width, heads=heads, requires_grad=False)
            rows = [x.transpose(0, 1)[None] for x in qkv]
            out = compiled(*rows, block_mask=segments.block_mask(causal))[0].transpose(0, 1)
            expected = segment_attention(*qkv, segments, width**-0.5, causal, "sdpa")
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        count.append(graphs.frame_count)
    assert count[0] < count[1] == count[-1]


def test_flash_3_reads_the_model_s_own_tensors(monkeypatch):
    """No copy of q, k or v, although v is narrower."""
    package = flash_package(3)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(attention, "resolve", lambda name, *_: name)
    monkeypatch.setattr(attention, "_capability", lambda device: (9, 0))
    qkv = inputs(30, 192, 128)
    segment_attention(*qkv, Segments.of_lengths([10, 20], "cpu"), 1.0, True, "flash")
    [given_to_kernel] = package.calls
    for ours, theirs in zip(qkv, given_to_kernel, strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and ours.stride() == theirs.stride()


def test_early_flash_3_returns_a_pair(monkeypatch):
    package = flash_package(3, returns_normaliser=True)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(attention, "resolve", lambda name, *_: name)
    monkeypatch.setattr(attention, "_capability", lambda device: (9, 0))
    assert_equals_dense(inputs(30, 16, 8, dtype=torch.float64), [10, 20], True, "flash")


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_of_older_torch(monkeypatch, causal):
    """Up to some release, `varlen_attn` had a flag for causal attention; now it is a window."""
    seen = {}

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None):
        seen.update(is_causal=is_causal, scale=scale)
        return value

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    attention._varlen_function.cache_clear()
    try:
        q, k, v = inputs(8, 16, 16)
        attention._varlen(q, k, v, Segments.of_lengths([8], "cpu"), 0.5, causal)
    finally:
        attention._varlen_function.cache_clear()
    assert seen == {"is_causal": causal, "scale": 0.5}


# ---- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator writes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("widths", [(24, 24), (24, 16)])
def test_memory_is_linear_in_tokens(widths):
    """Nothing that is computed or kept, forward or backward, is larger than the queries; not for one long segment."""
    for lengths in ([2048], [1024, 1000, 24], [64] * 32):
        q, k, v = inputs(2048, *widths, heads=1)
        saved: dict[int, int] = {}

        def keep(x, saved=saved):
            saved[x.data_ptr()] = x.numel()
            return x

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = segment_attention(q, k, v, Segments.of_lengths(lengths, "cpu"), 1.0, True, "sdpa")
            torch.autograd.grad(out.sum(), (q, k, v))
        assert saved and largest.elements
        assert max(largest.elements, *saved.values()) <= q.numel()
        assert sum(saved.values()) <= 5 * q.numel()


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine(capability, packages): a CUDA device and installed packages, as far as the choice asks for them."""

    def make(capability, *packages):
        monkeypatch.setattr(attention, "_capability", lambda device: capability)
        monkeypatch.setattr(attention, "find_spec", lambda name: name if name in packages else None)

    return make


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "expected"),
    [
        ((9, 0), (), torch.bfloat16, "varlen"),
        ((9, 0), ("flash_attn",), torch.float16, "varlen"),
        ((9, 0), ("flash_attn_interface",), torch.bfloat16, "flash"),
        ((8, 0), ("flash_attn_interface",), torch.bfloat16, "varlen"),  # no kernels of FlashAttention 3
        ((10, 0), ("flash_attn_interface",), torch.bfloat16, "varlen"),
        ((9, 0), ("flash_attn_interface",), torch.float32, "sdpa"),
        ((7, 5), ("flash_attn",), torch.float16, "sdpa"),
    ],
)
def test_auto_on_cuda(machine, capability, packages, dtype, expected):
    machine(capability, *packages)
    assert resolve("auto", CUDA, dtype) == expected


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_auto_elsewhere_is_sdpa(device):
    assert resolve("auto", torch.device(device), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        (
            "varlen",
            CPU,
            torch.bfloat16,
            "kernels.attention=varlen needs a CUDA device .*, not cpu in bfloat16; use sdpa",
        ),
        ("varlen", CUDA, torch.float32, "needs .* bf16 or fp16, not cuda in float32; use sdpa, or auto"),
        ("flash", CUDA, torch.bfloat16, "kernels.attention=flash needs the package flash-attn"),
        ("flash", CPU, torch.float32, "kernels.attention=flash needs the package flash-attn"),
        ("flex", torch.device("mps"), torch.float32, "kernels.attention=flex needs a CUDA device, or a CPU"),
        ("eager", CPU, torch.float32, "kernels.attention=eager: choose one of auto, varlen, flash, flex, sdpa"),
    ],
)
def test_a_kernel_that_cannot_run_is_named(machine, name, device, dtype, message):
    machine((9, 0))
    with pytest.raises(ValueError, match=message) as error:
        resolve(name, device, dtype)
    assert "\n" not in str(error.value)


def test_named_kernels_are_kept(machine):
    machine((9, 0), "flash_attn")
    for name in ("varlen", "flash", "flex", "sdpa"):
        assert resolve(name, CUDA, torch.bfloat16) == name
    machine((7, 5), "flash_attn")
    with pytest.raises(ValueError, match=r"capability 8.0"):
        resolve("varlen", CUDA, torch.float16)


def test_the_dtype_is_autocast_s(monkeypatch):
    """Rotary angles make q float32 under autocast; the kernel is chosen for, and gets, autocast's dtype."""
    seen = []
    monkeypatch.setattr(attention, "resolve", lambda name, device, dtype: seen.append(dtype) or "sdpa")
    q, k, v = inputs(8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = segment_attention(q, k, v.bfloat16(), Segments.of_lengths([8], "cpu"), 1.0, True)
        assert attention.compute_dtype(q.double()) == torch.float64  # which autocast leaves alone
    assert out.dtype == torch.bfloat16 and seen == [torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), (q, k)))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", [(192, 128), (72, 72), (24, 16)])
@pytest.mark.parametrize("kernel", ["varlen", "flash", "flex", "sdpa", "auto"])
def test_on_cuda(kernel, widths, causal):
    try:
        resolve(kernel, CUDA, torch.bfloat16)
    except ValueError as reason:
        pytest.skip(str(reason))
    for lengths in ([513, 128, 1, 1, 300], LENGTHS, [128] * 4):  # several lengths: compiled kernels are used again
        qkv = inputs(sum(lengths), *widths, dtype=torch.bfloat16, device="cuda", heads=4)
        assert_equals_dense(qkv, lengths, causal, kernel, scale=1 / math.sqrt(widths[0]), atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "auto"])
def test_float32_on_cuda(kernel):
    lengths = [513, 128, 1, 1, 300]
    qkv = inputs(sum(lengths), 72, 72, device="cuda", heads=4)
    assert_equals_dense(qkv, lengths, True, kernel, scale=0.1, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash", "flex"])
def test_memory_on_cuda_is_linear(kernel):
    try:
        resolve(kernel, CUDA, torch.bfloat16)
    except ValueError as reason:
        pytest.skip(str(reason))
    peaks = []
    for tokens in (16_384, 32_768):
        for _ in range(2):  # the first call of a compiled kernel has memory of its own
            qkv = inputs(tokens, 192, 128, dtype=torch.bfloat16, device="cuda", heads=2)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = segment_attention(*qkv, Segments.of_lengths([tokens], "cuda"), 0.1, True, kernel)
            torch.autograd.grad(out.float().sum(), qkv)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]
