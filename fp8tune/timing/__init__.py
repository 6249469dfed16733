"""How long forward + backward of a layer take: clocks, warming, replay, accuracy, memory.

In come captured samples and recipes; out go measurements with their raw times. Training
is left as it was: random state, gradients and streams are those of before.
"""
