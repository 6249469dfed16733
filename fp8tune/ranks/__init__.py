"""Agreement between ranks: who they are, and what they measured as one table.

In come one rank's records; out go records that are the same on every rank.
"""
