"""Kimi-VL for transformers: importing this package registers configuration, model and processors."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# from its own module: at the top level, transformers 5.17 hides it where torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from kimivl.model import attention, experts
from kimivl.model.configuration import KimiVLConfig, MoonViTConfig
from kimivl.model.kernels import Kernels
from kimivl.model.modeling import KimiVLForConditionalGeneration
from kimivl.model.processor import KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.vision import MoonViT

attention.register()
experts.register()
AutoConfig.register("moonvit", MoonViTConfig, exist_ok=True)
AutoConfig.register("kimi_vl", KimiVLConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(KimiVLConfig, slow_image_processor_class=KimiVLImageProcessor, exist_ok=True)
AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)

__all__ = [
    "Kernels",
    "KimiVLConfig",
    "KimiVLForConditionalGeneration",
    "KimiVLImageProcessor",
    "KimiVLProcessor",
    "MoonViT",
    "MoonViTConfig",
]
