"""Base model to chat model: supervised fine-tuning on conversations."""
