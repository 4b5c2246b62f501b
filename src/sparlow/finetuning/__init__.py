"""LoRA fine-tuning of a compressed model from its low-rank part."""
