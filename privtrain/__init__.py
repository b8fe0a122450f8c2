"""Differentially private fine-tuning of language models."""
