"""TRL's ``GRPOTrainer`` with generation by transformers, on the language model alone: the problems are texts.

TRL has no way to give this model its images. Its language model is transformers' own ``DeepseekV3ForCausalLM`` on both
sides, with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.iterations import ENDLESS, Side, Workload, rewarded
from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.shards import expand, read_sample, scan_shard
from kimivl.data.storage import Storage
from kimivl.model import KimiVLForConditionalGeneration
from kimivl.model.tokenizer import text_encoder


class TRL(Side):
    """GRPO without a KL term: as many updates an iteration as our side makes, with AdamW."""

    about = "TRL: GRPOTrainer, generation by transformers"
    fresh = True

    def __init__(self, workload: Workload, overrides: Sequence[str]) -> None:
        super().__init__()
        self.workload = workload
        processor = load_processor(workload.start)
        self.tokenizer = processor.tokenizer
        self.tokenizer.eos_token = "<|im_end|>"
        model = KimiVLForConditionalGeneration.from_pretrained(workload.start)
        shapes = model.config.text_config.to_dict() | {"attn_implementation": "sdpa"}
        language = DeepseekV3ForCausalLM(DeepseekV3Config(**shapes))
        language.load_state_dict(model.language_model.state_dict())
        language.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.trainer = _Timed(
            self,
            model=language,
            reward_funcs=self._reward,
            args=self._config(),
            train_dataset=Dataset.from_dict({"prompt": self._prompts(processor)}),
            processing_class=self.tokenizer,
            callbacks=[_Turns(self)],
        )
        told = _ToldLengths(self)
        language.generate = partial(language.generate, logits_processor=LogitsProcessorList([told]))
        self.door.run(self.trainer.train)

    def _prompts(self, processor: Any) -> list[str]:
        """The chats as texts that the tokenizer turns into our side's prompt ids."""
        tokenizer, storage = self.tokenizer, Storage()
        encoder = SampleEncoder(tokenizer, processor.image_processor, text_encoder(tokenizer))
        prompts = []
        for shard in expand(self.workload.shards):
            for record in scan_shard(storage, shard, _raise):
                ids = encoder.encode_prompt(read_sample(storage, shard, record.offset, record.size)).input_ids.tolist()
                text = tokenizer.decode(ids)
                if tokenizer(text)["input_ids"] != ids:
                    raise ValueError(f"{text!r} is not tokenized as in our side")
                prompts.append(text)
        return prompts

    def _config(self) -> GRPOConfig:
        w = self.workload
        return GRPOConfig(
            output_dir=str(w.folder / "trl"),
            per_device_train_batch_size=w.problems * w.responses // w.updates,
            steps_per_generation=w.updates,
            num_generations=w.responses,
            max_completion_length=w.longest,
            max_steps=ENDLESS * w.updates,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            beta=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=w.seed,
        )

    def _reward(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        self.door.lengths = [len(ids) for ids in completion_ids]
        return [float(rewarded(ids)) for ids in completion_ids]


class _ToldLengths(LogitsProcessor):
    """A response ends where it is told to, by its row."""

    def __init__(self, side: TRL) -> None:
        self.side = side
        self.prompt = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.side.fresh:
            self.prompt, self.side.fresh = input_ids.shape[1], False
            self.lengths = torch.from_numpy(self.side.workload.lengths(self.side.door.number))
        ends = self.lengths == input_ids.shape[1] - self.prompt + 1
        stop = self.side.tokenizer.eos_token_id
        scores[:, stop] = float("-inf")
        scores[ends] = float("-inf")
        scores[ends, stop] = 0.0
        return scores


class _Timed(GRPOTrainer):
    """The trainer, whose phases are timed."""

    def __init__(self, side: TRL, **settings: Any) -> None:
        self.side = side
        self.collecting = False
        super().__init__(**settings)

    def _phase(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.side.door.phase(name):
            return work(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.side.fresh = True
        return self._phase("generate", super()._generate, *args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return self._phase("score", super()._calculate_rewards, *args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        self.collecting = True
        try:
            return super()._generate_and_score_completions(*args, **kwargs)
        finally:
            self.collecting = False

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        work = super()._get_per_token_logps_and_entropies
        return self._phase("reference", work, *args, **kwargs) if self.collecting else work(*args, **kwargs)


class _Turns(TrainerCallback):
    """The door before the first and after the last step of an iteration."""

    def __init__(self, side: TRL) -> None:
        self.side = side

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.side.workload.updates == 0:
            self.side.door.enter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.side.workload.updates == 0:
            self.side.door.leave()


def _raise(fault: Exception) -> None:
    raise fault
