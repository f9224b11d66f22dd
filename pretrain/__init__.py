"""Ids to a base model: prepare packed blocks, train a GPT-2-style model, sample from it."""
