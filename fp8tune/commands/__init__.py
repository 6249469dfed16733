"""The commands of ``fp8tune``, one module each; they return lines and data.

``fp8tune.commands.cli`` imports the one that is asked for and prints what it returns.
"""

__all__: list[str] = []
