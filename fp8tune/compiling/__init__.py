"""torch.compile: what the user asked for, and what Inductor and Dynamo make of it.

In come the user's ``compile`` argument and the recipes in use; out go a compiled model,
options for timing, and Dynamo's caches and limits as they were. Private places of torch
are touched here only, each behind one guarded function.
"""
