"""Changes of a config that make it fit, the cheapest first, each tried in the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kimivl.memory.estimate import ANSWERING, Estimate, PackEstimate, estimate
from kimivl.memory.generation import cached_numbers
from kimivl.memory.setup import PATCHES_PER_TOKEN, Numbers, Pack, Setup

SHORTEST = 1024
"""Tokens below which no pack is proposed, nor a cap of responses."""


@dataclass(frozen=True, slots=True)
class Change:
    """An override as a user types it, and what it does to the setup."""

    override: str
    apply: Callable[[Setup], Setup]


def remedies(found: Estimate, capacity: float) -> tuple[Change, ...] | None:
    """The first changes that fit together, none of which can be left out; None where nothing fits.

    Slower but exact ones come first (the model cut up over the devices, recomputation, fewer responses at a time), then
    numbers of fewer bits, the step in the backward pass, shorter packs and answers, and last what trains less (LoRA).
    """
    chosen: list[Change] = []
    current = found
    while current.peak > capacity:
        change = next(_changes(current, capacity), None)
        if change is None:
            return None
        after = estimate(change.apply(current.setup), current)
        key = change.override.split("=")[0]
        chosen = [earlier for earlier in chosen if earlier.override.split("=")[0] != key] + [change]
        current = after
    for change in list(chosen):
        without = [other for other in chosen if other is not change]
        if estimate(_applied(found.setup, without), current).peak <= capacity:
            chosen = without
    return tuple(chosen)


def _applied(setup: Setup, changes: list[Change]) -> Setup:
    for change in changes:
        setup = change.apply(setup)
    return setup


def _changes(current: Estimate, capacity: float) -> Iterator[Change]:
    setup = current.setup
    if setup.devices > 1 and not setup.sharded and current.parameters.certain > 0.5 * capacity:
        yield Change("strategy=fsdp", lambda one: replace(one, sharded=True))
    if setup.checkpointing != "full":
        mode = "selective" if setup.checkpointing == "none" else "full"
        yield Change(f"activation_checkpointing={mode}", lambda one: replace(one, checkpointing=mode))
    if setup.numbers.parameter == 4 and not setup.on_cpu:
        yield Change("trainer.precision=bf16-true", lambda one: replace(one, numbers=Numbers(2, 2)))
    if setup.engine.kind == "vllm" and not setup.engine.sleeps and not setup.on_cpu and setup.asked:
        yield Change("rollout.sleep=true", _in_engine(sleeps=True))
    for pack in current.packs:
        if pack.peak.name in ANSWERING and pack.peak.total > capacity:
            yield from _answering(setup, pack.peak.name)
            break
    too_large = [pack for pack in current.packs if pack.training > capacity]
    if setup.max_accumulate > setup.accumulate and setup.rollouts is not None and too_large:
        yield _smaller_experience(min(2 * setup.accumulate, setup.max_accumulate))
    for pack in too_large:
        if setup.rollouts is None and not setup.patches_given and pack.pack.patches > pack.pack.tokens // 4:
            yield _fewer_patches(pack)
    alone = setup.devices == 1 and setup.accumulate == 1 and setup.rollouts is None
    if alone and setup.lora is None and not current.parameters.in_backward:
        override = "optimizer=muon_in_backward trainer.gradient_clip_val=null"
        yield Change(override, _in_backward)
    if setup.lora is None and current.parameters.certain > 0.8 * capacity:
        yield _adapters()
    for pack in too_large:
        if setup.rollouts is None and pack.pack.tokens >= 2 * SHORTEST:
            yield _shorter(pack)
    if setup.lora is None:
        yield _adapters()


def _in_backward(setup: Setup) -> Setup:
    kept = {key: value for key, value in setup.optimizer.items() if key not in ("_target_", "fused", "foreach")}
    if not setup.optimizer["_target_"].startswith("kimivl.optim"):
        kept = {"lr": kept.get("lr", 1e-5)}
    return replace(setup, optimizer=kept | {"_target_": "kimivl.optim.MuonAdamWInBackward"})


def _adapters() -> Change:
    settings = {"rank": 16, "alpha": 32, "targets": ["attention"]}
    return Change("lora=attention", lambda one: replace(one, lora=settings))


def _answering(setup: Setup, moment: str) -> Iterator[Change]:
    """For less at the moment of answering, by keys that the engine has."""
    engine, asked = setup.engine, setup.asked
    if engine.kind == "elsewhere":
        return
    if engine.kind == "vllm":
        token = cached_numbers(setup) * setup.engine_number
        if setup.engine_number == 4 and not setup.on_cpu:
            yield Change("rollout.dtype=bfloat16", _in_engine(number=2))
        gb = round(engine.cache / 2e9, 2)
        length = engine.length or setup.model.text_config.max_position_embeddings
        if gb * 1e9 >= token * length:  # vLLM does not start with less
            yield Change(f"rollout.kv_cache_gb={gb:g}", _in_engine(cache=gb * 1e9))
    rows = max(one.rows for one in asked)
    if rows > 1:
        yield _fewer_rows(rows // 2)
    longest = max(one.prompt for one in asked)
    if engine.kind == "hf" and engine.prefill_tokens >= 2 * longest:
        tokens = engine.prefill_tokens // 2
        yield Change(f"rollout.prefill_tokens={tokens}", _in_engine(prefill_tokens=tokens))
    if engine.kind == "hf" and moment == "evaluation" and setup.held_out is not None:
        new = max(one.new for one in setup.held_out.passes)
        if new >= 2 * SHORTEST:
            yield _shorter_answers(setup, new // 2)


def _in_engine(**settings: Any) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, engine=replace(setup.engine, **settings))


def _fewer_rows(rows: int) -> Change:
    def apply(setup: Setup) -> Setup:
        rollouts, held_out = setup.rollouts, setup.held_out
        return replace(
            setup,
            rollouts=rollouts and rollouts.within(rows),
            held_out=held_out and replace(held_out, passes=tuple(one.within(rows) for one in held_out.passes)),
            engine=replace(setup.engine, max_rows=rows),
        )

    return Change(f"rollout.max_rows={rows}", apply)


def _shorter_answers(setup: Setup, new: int) -> Change:
    """Those of the evaluation only: the rollouts, whose cap follows it unless it is given, keep theirs."""

    def apply(one: Setup) -> Setup:
        assert one.held_out is not None
        return replace(
            one,
            held_out=replace(one.held_out, passes=tuple(replace(answers, new=new) for answers in one.held_out.passes)),
        )

    kept = "" if setup.rollouts is None else f" data.max_new_tokens={setup.rollouts.new}"
    return Change(f"evaluation.max_new_tokens={new}{kept}", apply)


def _smaller_experience(accumulate: int) -> Change:
    def apply(setup: Setup) -> Setup:
        share = setup.accumulate / accumulate
        [pack] = setup.packs
        smaller = replace(
            pack,
            label=f"{accumulate} packs a step",
            tokens=max(setup.rollouts.tokens if setup.rollouts else 1, round(pack.tokens * share)),
            patches=pack.patches if setup.patches_given else round(pack.patches * share),
        )
        return replace(setup, packs=(smaller,), accumulate=accumulate)

    return Change(f"trainer.accumulate_grad_batches={accumulate}", apply)


def _fewer_patches(found: PackEstimate) -> Change:
    phase, patches = found.pack.phase, max(found.pack.tokens // 4, found.pack.patches // 2)
    return Change(f"++data.phases.{phase}.max_patches={patches}", _in_phase(phase, lambda one: (one.tokens, patches)))


def _shorter(found: PackEstimate) -> Change:
    phase, tokens = found.pack.phase, found.pack.tokens // 2
    return Change(
        f"data.phases.{phase}.max_length={tokens}",
        _in_phase(phase, lambda one: (tokens, min(one.patches, PATCHES_PER_TOKEN * tokens))),
    )


def _in_phase(phase: int, limits: Callable[[Pack], tuple[int, int]]) -> Callable[[Setup], Setup]:
    """Other limits, of tokens and patches, for the packs of a phase; the other phases keep theirs."""

    def change(pack: Pack) -> Pack:
        tokens, patches = limits(pack)
        return replace(pack, tokens=tokens, patches=patches) if pack.phase == phase else pack

    return lambda setup: replace(setup, packs=tuple(map(change, setup.packs)))
