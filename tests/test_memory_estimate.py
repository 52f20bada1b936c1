"""The memory estimate: its formulas against what autograd keeps and what a step really takes, and its verdicts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kimivl.cli import main
from kimivl.config import compose_run
from kimivl.data.pack import IGNORE, EncodedSample
from kimivl.data.sample import Sample
from kimivl.memory import Device, Estimate, Setup, estimate
from kimivl.memory import generation as memory_of_generation
from kimivl.memory.activations import GROUPED_TOKENS, decoder_layer, vision_block
from kimivl.memory.check import check_memory
from kimivl.memory.estimate import ANSWERING, Moment
from kimivl.memory.generation import generation
from kimivl.memory.live import LiveBytes
from kimivl.memory.parameters import measure
from kimivl.memory.remedies import _answering, remedies
from kimivl.memory.setup import EVALUATION_BATCH, Answers, Engine, HeldOut, Numbers, Pack
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration, cache, experts
from kimivl.model import segment_attention as kernels
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.segments import Segments
from kimivl.model.vision import rope_2d
from kimivl.optim import MuonAdamW
from kimivl.rl.hf import HFRolloutEngine
from kimivl.rl.types import Policy, Problem, Request, Sampling
from kimivl.stages import datamodule

MUON = {"_target_": "kimivl.optim.MuonAdamW", "lr": 1e-3}


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters and what is given."""

    def __init__(self, model: nn.Module, *given: Tensor) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *given]}
        self._held: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def recipe(name: str, **changes: Any) -> KimiVLConfig:
    fields = yaml.safe_load((Path(__file__).parents[1] / f"conf/model/{name}.yaml").read_text())
    text = {"text_config": fields["text_config"] | changes.pop("text_config", {})}
    return KimiVLConfig(**{key: value for key, value in (fields | changes | text).items() if key[0] != "_"})


@pytest.fixture(scope="module")
def small() -> KimiVLConfig:
    return recipe("tiny", vocab_size=1000, media_placeholder_token_id=999)


def setup_of(config: KimiVLConfig, **settings: Any) -> Setup:
    defaults = {"numbers": Numbers(4, 4), "packs": (Pack("a pack", 1024, 256),), "optimizer": MUON, "on_cpu": True}
    return Setup(**{"model": config} | defaults | settings)


# ---- blocks on the CPU ----------------------------------------------------------------------------------------------

T, GRIDS = 1024, [(16, 16)] * 4


def decoder_inputs(model: KimiVLForConditionalGeneration, lengths: list[int], device: str = "cpu") -> dict[str, Any]:
    x = torch.zeros(1, sum(lengths), model.config.text_config.hidden_size, device=device, dtype=model.dtype)
    segments = Segments.of_lengths(lengths, device)
    rotary = model.language_model.model.rotary_emb(x, torch.arange(sum(lengths), device=device)[None])
    return {"hidden_states": x.requires_grad_(), "segments": segments, "position_embeddings": rotary, "kernel": "sdpa"}


def run_layer(model: KimiVLForConditionalGeneration, number: int, inputs: dict[str, Any]) -> Tensor:
    mask = inputs["segments"].cu_seqlens.view(1, 1, 1, -1)
    return model.language_model.model.layers[number](attention_mask=mask, use_cache=False, **inputs)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("number", [0, 1], ids=["dense", "experts"])
def test_a_decoder_layer_keeps_what_the_formula_says(small: KimiVLConfig, mode: str, number: int):
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(small).train()
    checkpoint_activations(model, mode)
    inputs = decoder_inputs(model, [T // 2, T // 2])
    given = inputs["position_embeddings"]
    with torch.no_grad():
        inputs["hidden_states"].normal_()
    with LiveBytes([*model.parameters(), *model.buffers(), *given]) as live:
        out = run_layer(model, number, inputs)
        block = decoder_layer(setup_of(small, checkpointing=mode), number == 0, T // 2)
        result = 4 * small.text_config.hidden_size
        held = live.now / T - result + block.inputs  # which was there before

    print(f"{mode} {number}: {held:.0f} bytes a token, formula {block.held(mode):.0f}")
    assert block.held(mode) == pytest.approx(held, rel=0.1)
    del out


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_vision_block_keeps_what_the_formula_says(small: KimiVLConfig, mode: str):
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(small).train()
    checkpoint_activations(model, mode)
    patches = sum(h * w for h, w in GRIDS)
    x = torch.randn(patches, small.vision_config.hidden_size, requires_grad=True)
    rope = rope_2d(GRIDS, model.vision_tower.head_dim, torch.device("cpu"))
    segments = Segments.of_lengths([h * w for h, w in GRIDS], "cpu")
    with LiveBytes([*model.parameters(), x, *rope]) as live:
        out = model.vision_tower.encoder.blocks[0](x, rope, segments, "sdpa")
        block = vision_block(setup_of(small, checkpointing=mode), 256)
        held = live.now / patches - 4 * small.vision_config.hidden_size + block.inputs

    print(f"{mode}: {held:.0f} bytes a patch, formula {block.held(mode):.0f}")
    assert block.held(mode) == pytest.approx(held, rel=0.1)
    del out


# ---- Kimi-VL-A3B on a GPU, as far as the meta device can tell -------------------------------------------------------


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> Iterator[KimiVLForConditionalGeneration]:
    """Two layers of Kimi-VL-A3B in bfloat16 on the meta device, with the kernels of a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *device, **settings: nullcontext())  # the meta device has none
    monkeypatch.setattr(experts, "resolve", lambda *name: "grouped_mm")
    monkeypatch.setitem(kernels._KERNELS, "sdpa", kernels._varlen)
    config = recipe("kimi_vl_a3b")
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 1
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield KimiVLForConditionalGeneration(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [32768, 131072])
@pytest.mark.parametrize("number", [0, 1], ids=["dense", "experts"])
def test_a_layer_of_kimi_vl_a3b(gpu_like, tokens: int, number: int):
    """Bytes of a token; at these lengths the gradients of the weights are next to nothing of it."""
    inputs = decoder_inputs(gpu_like, [tokens], "meta")
    setup = setup_of(gpu_like.config, numbers=Numbers(2, 2), on_cpu=False)
    block = decoder_layer(setup, number == 0, tokens)
    with LiveBytes([*gpu_like.parameters(), *gpu_like.buffers(), *inputs["position_embeddings"]]) as live:
        out = run_layer(gpu_like, number, inputs)
        held = live.now / tokens - 2 * out.shape[-1]  # its input is not kept: RMSNorm keeps a copy in float32
        live.peak = live.now
        out.backward(torch.empty_like(out))
    height = live.peak / tokens

    print(f"kept {held:.0f}, formula {block.kept:.0f}; height {height:.0f}, formula {block.kept + block.passing:.0f}")
    assert block.kept == pytest.approx(held, rel=0.1)
    assert block.kept + block.passing == pytest.approx(height, rel=0.1)


def test_long_packs_go_through_the_experts_in_parts():
    assert experts._GROUPED_TOKENS == GROUPED_TOKENS


# ---- a whole step on the CPU ----------------------------------------------------------------------------------------

LENGTHS, IMAGES = [256] * 8, [(16, 16)] * 8


def peak_of_a_step(config: KimiVLConfig, mode: str, freeze: tuple[str, ...]) -> int:
    """Bytes of the second step at its peak, weights and all, zeroing gradients when Lightning does."""
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(config).train()
    for part in freeze:
        getattr(model, part).requires_grad_(False)
    checkpoint_activations(model, mode)
    optimizer = MuonAdamW([(n, w) for n, w in model.named_parameters() if w.requires_grad], lr=1e-4)
    ids = torch.randint(0, 900, (sum(LENGTHS),))
    for number, (h, w) in enumerate(IMAGES):
        ids[number * LENGTHS[0] : number * LENGTHS[0] + h * w // 4] = config.media_placeholder_token_id
    pack = {
        "input_ids": ids,
        "targets": ids.roll(-1),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "pixel_values": torch.zeros(sum(h * w for h, w in IMAGES), 3, 14, 14, dtype=torch.uint8),
        "image_grid_hws": torch.tensor(IMAGES),
    }
    weights = sum(w.numel() * 4 for w in model.parameters())
    with LiveBytes([*model.parameters(), *model.buffers(), *pack.values()]) as live:
        for _ in range(2):
            loss = -model.target_log_probs(**pack).mean()
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return live.peak + weights


STEPS = [(mode, freeze) for mode in ("none", "full", "selective") for freeze in ((), ("vision_tower",))]
QUICK = [("none", ()), ("full", ()), ("selective", ("vision_tower",))]


@pytest.mark.parametrize(
    ("mode", "freeze"), [pytest.param(*step, marks=[] if step in QUICK else pytest.mark.slow) for step in STEPS]
)
def test_the_peak_of_a_whole_step(small: KimiVLConfig, mode: str, freeze: tuple[str, ...]):
    pack = Pack("a pack", sum(LENGTHS), sum(h * w for h, w in IMAGES))
    found = estimate(setup_of(small, packs=(pack,), checkpointing=mode, freeze=freeze))
    measured = peak_of_a_step(small, mode, freeze)

    print(f"{mode} {freeze}: {measured / 1e6:.1f} MB, estimate {found.peak / 1e6:.1f} in {found.packs[0].peak.name}")
    assert found.peak == pytest.approx(measured, rel=0.15)


# ---- answering ------------------------------------------------------------------------------------------------------


def problem(number: int, tokens: int, images: int, media: int) -> Problem:
    """A prompt of so many tokens, with images of 16 x 16 patches among them."""
    ids = torch.randint(10, 300, (tokens,), generator=torch.Generator().manual_seed(number))
    ids[: 64 * images] = media
    encoded = EncodedSample(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        pixel_values=torch.zeros(256 * images, 3, 14, 14, dtype=torch.uint8),
        image_grid_hws=torch.tensor([(16, 16)] * images, dtype=torch.int64).reshape(-1, 2),
    )
    return Problem(number, Sample(key=f"p{number}", messages=[], images=(), answer="1"), encoded)


@pytest.mark.parametrize(
    ("vocabulary", "problems", "samples", "prompt", "new", "images", "engine"),
    [
        pytest.param(20_000, 16, 4, 20, 8, 0, {}, id="logits"),
        pytest.param(1000, 4, 16, 20, 150, 0, {}, id="a cache that has grown"),
        pytest.param(1000, 16, 1, 256, 4, 3, {"prefill_tokens": 2048}, id="the vision tower"),
        pytest.param(1000, 48, 1, 300, 4, 0, {"prefill_tokens": 512}, id="prompts that were read"),
        pytest.param(1000, 32, 1, 60, 132, 0, {"prefill_tokens": 960, "max_rows": 16}, id="rows filled again"),
        pytest.param(1000, 8, 1, 300, 4, 0, {}, id="reading"),
    ],
)
def test_the_peak_of_answering(
    vocabulary: int, problems: int, samples: int, prompt: int, new: int, images: int, engine: dict[str, int]
):
    """Responses that all run to their cap, by the training model itself, beside its weights."""
    torch.manual_seed(0)
    config = recipe("tiny", vocab_size=vocabulary, media_placeholder_token_id=vocabulary - 1)
    model = KimiVLForConditionalGeneration(config).eval()
    policy = Policy(model, decode=str, stop_id=-1, pad_id=0, never=(vocabulary - 1,))
    posed = [problem(number, prompt, images, vocabulary - 1) for number in range(problems)]
    requests = [Request(one, 100 * one.number + g) for one in posed for g in range(samples)]
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        HFRolloutEngine(policy, **engine).generate(requests, Sampling(new))

    own = Engine("hf", **engine)
    batch = max(1, own.prefill_tokens // prompt)
    packs = (Pack("a pack", 1024, 256 * images * batch),)
    setup = setup_of(config, packs=packs, patches_given=True, engine=own)
    asked = Answers(len(requests), min(len(requests), own.max_rows), samples, prompt, new)
    found = generation(setup, measure(setup), asked, 0.0)
    print(f"{live.peak / 1e6:.1f} MB, estimate {found.total / 1e6:.1f}: {found.purpose}")
    assert found.total == pytest.approx(live.peak, rel=0.22)


def resolved(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose_run("experiment=kimi_vl_a3b", *overrides), resolve=True)  # type: ignore[return-value]


HELD_OUT = ["data.val_shards=val.tar"]


@pytest.mark.parametrize(
    ("overrides", "in_fit"),
    [
        (HELD_OUT, True),
        (["data.test_shards=test.tar", "test=true"], False),
        ([*HELD_OUT, "trainer.check_val_every_n_epoch=2"], True),
        ([*HELD_OUT, "trainer.check_val_every_n_epoch=3"], False),
    ],
)
def test_who_has_held_out_problems_answers_them(overrides: list[str], in_fit: bool):
    """As ``kimivl.run`` has it: two epochs here."""
    held_out = Setup.of(resolved("stage=sft", *overrides)).held_out
    assert held_out is not None and held_out.in_fit is in_fit
    assert [one.rows for one in held_out.passes] == [128, 256]
    assert {one.tokens for one in held_out.passes} == {1024 + 16384}


def test_without_held_out_problems_there_is_no_evaluation():
    assert Setup.of(resolved("stage=sft")).held_out is None
    assert Setup.of(resolved("stage=sft", "data.test_shards=test.tar", "test=false")).held_out is None


def moment_of(name: str, *overrides: str, **settings: Any) -> Moment:
    found = estimate(replace(Setup.of(resolved(*overrides)), **settings))
    return next(moment for moment in found.packs[0].moments if moment.name == name)


def test_an_evaluation_counts_the_whole_model_beside_the_states():
    """Of a model that is cut up over 16 devices: what must be there before the first key is written."""
    share = ["stage=sft", "data=kimi_vl_sft_8k", "strategy=fsdp", "trainer.devices=16", *HELD_OUT]
    moment = moment_of("evaluation", *share)
    assert moment.rows["weights gathered"] == pytest.approx(32.8e9, rel=0.01) and moment.rows["gradients"] == 0
    assert moment.rows["optimiser: momentum"] > 0 and moment.total - moment.rows["KV cache"] > 38.6e9
    assert moment.rows["KV cache"] == 256 * 31_104 * (1024 + 16384 + 256)
    few = moment_of("evaluation", *share, "rollout.max_rows=4", "evaluation.max_new_tokens=1024")
    assert few.rows["KV cache"] < moment.rows["KV cache"] / 200


def test_after_the_fit_the_states_have_left_the_device_unless_the_model_is_cut_up():
    alone = moment_of("evaluation", "stage=sft", "data.test_shards=test.tar", "test=true")
    assert "optimiser: momentum" not in alone.rows and alone.rows["gradients"] == 0
    several = ["strategy=fsdp", "trainer.devices=4"]
    share = moment_of("evaluation", "stage=sft", "data.test_shards=test.tar", "test=true", *several)
    assert share.rows["optimiser: momentum"] > 0 and share.rows["gradients"] == 0


def test_lightning_frees_gradients_before_it_validates():
    """Which the estimate counts on: in a fit, and after one whose last steps were not validated."""
    seen = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Tensor) -> Tensor:
            return (self.weight * batch).sum()

        def validation_step(self, batch: Tensor) -> None:
            seen.append(self.weight.grad is None)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=3, check_val_every_n_epoch=2, num_sanity_val_steps=0, **settings)
    module, data = Module(), DataLoader(torch.ones(2))
    trainer.fit(module, data, DataLoader(torch.ones(1)))
    assert module.weight.grad is not None
    trainer.validate(module, DataLoader(torch.ones(1)), verbose=False)
    assert seen == [True, True]


def test_what_the_estimate_knows_of_the_code():
    assert EVALUATION_BATCH == datamodule.EVALUATION_BATCH and cache._ROOM == memory_of_generation._ROOM


def test_each_engine_takes_what_it_takes():
    rl = ["stage=rl"]
    own = moment_of("rollouts", *rl)
    vllm = moment_of("rollouts", *rl, "rollout=vllm", "rollout.kv_cache_gb=7")
    assert own.rows["KV cache"] > 100e9 and "engine: weights" not in own.rows
    assert vllm.rows["engine: weights"] == pytest.approx(32.8e9, rel=0.01) and vllm.rows["engine: KV cache"] == 7e9
    assert "KV cache" not in vllm.rows
    for sleeps in (True, False):
        setup = Setup.of(resolved(*rl, "rollout=vllm", f"rollout.sleep={str(sleeps).lower()}"))
        training = [moment for moment in estimate(setup).packs[0].moments if moment.name not in ANSWERING]
        assert all(("engine: weights" in moment.rows) is not sleeps for moment in training)
        assert all("engine: graphs" in moment.rows for moment in training)
    single = moment_of("rollouts", *rl, "rollout=vllm", "trainer.precision=bf16-mixed")
    half = moment_of("rollouts", *rl, "rollout=vllm", "trainer.precision=bf16-mixed", "rollout.dtype=bfloat16")
    assert single.rows["engine: weights"] == 2 * half.rows["engine: weights"]
    server = estimate(Setup.of(resolved(*rl, "rollout=vllm_server", *HELD_OUT)))
    assert not any(moment.name in ANSWERING or "engine: weights" in moment.rows for moment in server.packs[0].moments)
    idle = estimate(Setup.of(resolved("stage=sft", "rollout=vllm")))  # which nobody asks is not started
    assert not any("engine: graphs" in moment.rows for moment in idle.packs[0].moments)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["stage=sft", "rollout=hf"], 0.5),
        (["stage=rl", "rollout=hf"], 0.3),
        (["stage=sft", "rollout=vllm", "rollout.kv_cache_gb=40"], 0.6),
        (["stage=rl", "rollout=vllm", "rollout.kv_cache_gb=40", "rollout.sleep=false"], 0.8),
        (["stage=sft", "rollout=vllm_server"], 0.5),
    ],
)
def test_remedies_have_the_keys_of_the_engine(overrides: list[str], part: float):
    typed = ["model=small", *overrides, *HELD_OUT]
    found = estimate(Setup.of(resolved(*typed), 0))
    changes = remedies(found, part * found.peak)
    assert changes is not None
    words = [word for change in changes for word in change.override.split()]
    after = estimate(Setup.of(resolved(*typed, *words), 0))
    assert after.peak <= part * found.peak, words
    assert any(word.startswith("rollout.") for word in words) is ("rollout=vllm_server" not in overrides)


def test_a_vllm_that_stays_awake_is_put_to_sleep():
    typed = ["stage=sft", "model=small", "rollout=vllm", "rollout.kv_cache_gb=5", *HELD_OUT]
    awake, asleep = (estimate(Setup.of(resolved(*typed, f"rollout.sleep={value}"), 0)) for value in ("false", "true"))
    assert asleep.peak < awake.peak - 4e9
    changes = remedies(awake, asleep.peak)
    assert changes is not None and [change.override for change in changes] == ["rollout.sleep=true"]


def test_shorter_answers_of_an_evaluation_leave_the_rollouts_alone():
    setup = Setup.of(resolved("stage=rl", "rollout.max_rows=1", "rollout.prefill_tokens=1024", *HELD_OUT))
    [change] = [change for change in _answering(setup, "evaluation") if "max_new_tokens" in change.override]
    after = Setup.of(
        resolved("stage=rl", "rollout.max_rows=1", "rollout.prefill_tokens=1024", *HELD_OUT, *change.override.split())
    )
    assert after == change.apply(setup) and after.rollouts == setup.rollouts and after.held_out != setup.held_out


# ---- cut up over several devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "mode", "freeze"),
    [
        (8, "full", ()),
        pytest.param(2, "full", (), marks=pytest.mark.slow),
        pytest.param(8, "none", (), marks=pytest.mark.slow),
        pytest.param(8, "selective", ("vision_tower",), marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_share(ranks: int, mode: str, freeze: tuple[str, ...]):
    """What the allocator gave out to the first of the ranks of FSDP2."""
    import memory_of_a_share as share

    pack = Pack("a pack", sum(share.LENGTHS), sum(h * w for h, w in share.IMAGES))
    settings = {"packs": (pack,), "checkpointing": mode, "freeze": freeze, "sharded": True, "devices": ranks}
    found = estimate(setup_of(share.config(), **settings))
    command = [sys.executable, share.__file__, str(ranks), mode, *freeze]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)

    print(f"{ranks} {mode}: {measured / 1e6:.1f} MB, estimate {found.peak / 1e6:.1f} in {found.packs[0].peak.name}")
    assert found.peak == pytest.approx(measured, rel=0.15)
    assert found.peak < 0.8 * estimate(setup_of(share.config(), **settings | {"sharded": False})).peak


def test_the_whole_model_is_on_a_device_that_answers():
    """As long as it answers, or gives its weights to an engine."""
    import memory_of_a_share as share

    settings = {"sharded": True, "devices": 8, "held_out": HeldOut((), True)}
    found = estimate(setup_of(share.config(), engine=Engine("elsewhere"), **settings))
    done = subprocess.run([sys.executable, share.__file__, "8", "whole"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moment = found.packs[0].moments[-1]

    print(f"{int(done.stdout) / 1e6:.1f} MB, estimate {moment.total / 1e6:.1f}")
    assert moment.name == "evaluation" and moment.total == pytest.approx(int(done.stdout), rel=0.15)
    assert moment.total > 4 * found.parameters.numel
    small = setup_of(share.config(), engine=Engine("elsewhere"), **settings | {"sharded": False})
    assert "evaluation" not in [moment.name for moment in estimate(small).packs[0].moments]


def test_a_share_is_rows_of_the_first_rank(small: KimiVLConfig):
    whole, share = measure(setup_of(small)), measure(setup_of(small, sharded=True, devices=8))
    assert share.numel == whole.numel and share.gradients == pytest.approx(whole.gradients / 8, rel=0.02)
    assert share.states["momentum"] == pytest.approx(whole.states["momentum"] / 8, rel=0.02)
    many = measure(setup_of(small, sharded=True, devices=1000))  # a row of each
    rows = sum(w.numel() // len(w) for w in KimiVLForConditionalGeneration(small).parameters())
    assert many.gradients == 4 * rows


def test_devices_share_the_rollouts():
    alone, several = a3b("stage=rl"), a3b("stage=rl", "trainer.devices=8", "strategy=fsdp")
    data = OmegaConf.to_container(compose_run("experiment=kimi_vl_a3b", "stage=rl").data, resolve=True)
    assert alone.rollouts and several.rollouts and not alone.sharded and several.sharded
    assert several.rollouts.rows == min(alone.rollouts.rows, -(-data["problems"] // 8) * data["responses"])
    assert several.accumulate == -(-alone.accumulate // 8)


# ---- states and verdicts --------------------------------------------------------------------------------------------


def a3b(*overrides: str, patches: int | None = 0) -> Setup:
    cfg = compose_run("experiment=kimi_vl_a3b", *overrides)
    return Setup.of(OmegaConf.to_container(cfg, resolve=True), patches)


@pytest.fixture(scope="module")
def full() -> Estimate:
    return estimate(a3b("activation_checkpointing=full"))


def test_weights_and_states_of_kimi_vl_a3b(full: Estimate):
    parameters = full.parameters
    assert parameters.numel == 16_407_656_048 - 26 * 64  # the routing biases are buffers
    assert parameters.weights / 1e9 == pytest.approx(32.8, abs=0.05)
    assert parameters.gradients / 1e9 == pytest.approx(32.8, abs=0.05)
    assert parameters.states["momentum"] / 1e9 == pytest.approx(31.5, abs=0.1)
    assert parameters.states["moments"] / 1e9 == pytest.approx(2.7, abs=0.1)


def test_every_moment_is_the_sum_of_its_rows_and_the_peak_the_largest(full: Estimate):
    for pack in full.packs:
        assert pack.peak.total == max(sum(moment.rows.values()) for moment in pack.moments)
    assert full.peak == full.packs[1].peak.total > full.packs[0].peak.total


@pytest.mark.parametrize(
    ("settings", "bytes_of"),
    [
        ({"_target_": "kimivl.optim.MuonAdamW", "lr": 1.0, "rounding": "master"}, {"remainders": 2}),
        ({"_target_": "torch.optim.AdamW", "lr": 1.0}, {"moments": 4}),
    ],
)
def test_states_are_those_of_the_real_optimiser(
    small: KimiVLConfig, settings: dict[str, Any], bytes_of: dict[str, int]
):
    parameters = measure(setup_of(small, numbers=Numbers(2, 2), optimizer=settings))
    for kind, size in bytes_of.items():
        assert parameters.states[kind] == size * parameters.trained


def test_the_step_in_the_backward_pass_has_one_gradient_at_a_time(small: KimiVLConfig):
    settings = {"_target_": "kimivl.optim.MuonAdamWInBackward", "lr": 1e-3}
    parameters = measure(setup_of(small, optimizer=settings))
    usual = measure(setup_of(small))
    assert parameters.in_backward and parameters.states == usual.states
    assert usual.certain - parameters.certain == usual.gradients - usual.largest_gradient


def test_what_is_proposed_fits_and_nothing_of_it_can_be_left_out(small: KimiVLConfig):
    setup = setup_of(small, packs=(Pack("a pack", 32768, 131072),), patches_given=True)
    found = estimate(setup)
    capacity = 0.4 * found.peak
    changes = remedies(found, capacity)
    assert changes is not None
    applied = setup
    for change in changes:
        applied = change.apply(applied)
    assert estimate(applied).peak <= capacity < estimate(setup).peak
    assert remedies(found, 1e6) is None


@pytest.mark.parametrize(
    ("overrides", "gb"),
    [
        (["stage=sft"], 6),  # the packs of both phases are too large
        (["stage=sft"], 3),
        (["stage=sft", "activation_checkpointing=none", "trainer.precision=bf16-mixed", "optimizer=adamw"], 8),
        (["stage=sft", "data.phases.1.max_length=32768", "data.phases.1.max_patches=131072"], 4),
        (["stage=rl"], 12),
        (["stage=sft", "trainer.devices=4"], 3),
    ],
)
def test_what_is_said_to_fit_fits_as_it_is_typed(overrides: list[str], gb: float):
    def found(*more: str) -> Estimate:
        cfg = compose_run("experiment=kimi_vl_a3b", "model=small", *overrides, *more)
        return estimate(Setup.of(OmegaConf.to_container(cfg, resolve=True)))

    before = found()
    changes = remedies(before, gb * 1e9)
    assert before.peak > gb * 1e9 and changes is not None
    after = found(*(word for change in changes for word in change.override.split()))
    assert after.peak <= gb * 1e9


@pytest.mark.parametrize(
    ("text", "gib"), [("80GB", 79.1), ("80gb", 79.1), ("79.1GiB", 79.1), ("H200", 139.8), ("100GB", 97.0)]
)
def test_devices(text: str, gib: float):
    assert Device.of(text).capacity == pytest.approx(gib * 2**30, rel=1e-6)


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["memory", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "80XB"], "--gpu 80XB"),
        (["--gpu", "0GB"], "--gpu 0GB"),
        (["nonsense=1"], "nonsense"),
        (["data.phases=[]"], "data.phases is empty"),
        (["stage=sft", "data.phases.0.max_length=null"], "data.phases.0.max_length"),
        (["activation_checkpointing=half"], "activation_checkpointing: 'half' is not one of none, full, selective"),
        (["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed: type strategy=fsdp"),
        (
            ["trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy}"],
            "trainer.strategy=DDPStrategy: the estimate knows strategy=auto",
        ),
        (["model=kimi_vl_13b"], "kimi_vl_13b"),
        (["lora=attention", "lora.targets=[knees]"], "knees"),
    ],
)
def test_bad_input_is_one_line(capsys, words: list[str], message: str):
    code, _, error = cli(capsys, *words)
    assert code == 2 and message in error and error.count("\n") == 1, error


def test_the_command(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli(capsys, "stage=sft", "--gpu", "80GB", "activation_checkpointing=full")
    assert code == 0 and "fits" in out and "79.1 GiB" in out and max(map(len, out.splitlines())) <= 80
    code, out, _ = cli(capsys, "experiment=kimi_vl_a3b", "--gpu", "80GB", "trainer.devices=8", "strategy=fsdp")
    assert code == 0 and "cut up over 8 devices" in " ".join(out.split()) and "weights gathered from all" in out
    assert max(map(len, out.splitlines())) <= 80
    for more in (["rollout=vllm", *HELD_OUT], ["rollout=vllm_server", "strategy=fsdp", "trainer.devices=8", *HELD_OUT]):
        code, out, _ = cli(capsys, "experiment=kimi_vl_a3b", "stage=rl", "--gpu", "H200", *more)
        assert "evaluation" in out and max(map(len, out.splitlines())) <= 80
    code, out, error = cli(capsys, "experiment=kimi_vl_a3b", "--gpu", "80GB", "trainer.devices=8")
    assert code == 2 and error.endswith("what fits: strategy=fsdp\n")
    code, out, error = cli(capsys, "--gpu", "0.2GB")
    assert code == 2 and "activation_checkpointing=" in error and error.count("\n") == 1


def test_a_run_is_refused_or_warned(full: Estimate, caplog: pytest.LogCaptureFixture):
    cfg = OmegaConf.to_container(compose_run("experiment=kimi_vl_a3b", "++data.phases.1.max_patches=4"), resolve=True)
    with pytest.raises(ValueError, match="kimivl memory experiment=kimi_vl_a3b"):
        check_memory(cfg, ["experiment=kimi_vl_a3b"], Device("small", 80 * 10**9))
    check_memory(cfg, ["experiment=kimi_vl_a3b"], Device("middle", 120 * 10**9))
    assert "memory may run out" in caplog.text
    caplog.clear()
    check_memory(cfg, [], Device("large", 10**13))
    check_memory(cfg | {"trainer": cfg["trainer"] | {"accelerator": "cpu"}}, [], Device("none", 1))
    assert not caplog.text
