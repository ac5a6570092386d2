"""Model families by the `model_type` of their config.json. To add one: a file beside llama.py and a line in FAMILIES."""

from engine.models.llama import Llama, LlamaConfig

FAMILIES = {"llama": (LlamaConfig, Llama)}
