"""Pretrained models: load, describe, mask, cost."""
