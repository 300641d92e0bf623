"""Losses: one file each, with a functional form and an nn.Module. Their maths stands in bcmf_ext.reference."""
