"""Whole plans in real training steps: which is tried when, and which one wins.

In come a per-layer plan and the training steps that pass by; out goes the plan that the
steps confirmed.
"""
