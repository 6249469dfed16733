"""The user's model: what is looked at, watched and changed in it.

In comes an nn.Module; out go candidates, the calls and tensors that training used them
with, and the same module with layers converted or reverted in place.
"""
