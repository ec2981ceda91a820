//! Fine-tuning and distillation of small language models.
