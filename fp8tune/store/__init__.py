"""What is kept on disk: the cache of measurements, its format, locks and environment.

In come measurements, layers and trials under a key; out come the same in a later run.
"""
