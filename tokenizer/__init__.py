"""Text to token ids: the corpus reader, the BPE trainer and the chat template."""
