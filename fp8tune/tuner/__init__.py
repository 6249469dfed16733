"""When the stages run: the phases of tuning inside a training run.

In come the checked arguments of AutoFloat8 and calls of the model; out goes the frozen
plan. Only this room knows the order of the stages.
"""
