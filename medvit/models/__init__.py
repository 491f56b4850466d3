"""Batch -> features, logits. The one door to timm: any of its ViTs (and ResNet, Swin) behind one small interface."""
