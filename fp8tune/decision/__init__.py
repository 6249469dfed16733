"""Pure statistics and rules: from raw times to verdicts. Imports no torch.

In come layers and measurements, or the times of training steps; out go decisions with
their reasons. Equal input gives equal output, on every rank.
"""
