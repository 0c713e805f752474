"""Adapters: what is trained in place of the network's weights.

lora            settings, targets, modules          folder     adapters in checkpoints
base_identity   which model an adapter belongs to   loading    a base with an adapter, for evaluation
"""
