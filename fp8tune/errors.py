"""Everything that fp8tune raises on purpose.

::

    Fp8TuneError
    ├── ConfigError (ValueError)            an argument that cannot be right
    │   └── UnknownRecipeError              a recipe name that nobody registered
    ├── ModelError (ValueError)             a model that cannot be tuned as it is
    │   └── AlreadyCompiledError            torch.compile came before the tuner
    ├── PlanMismatchError (ValueError)      a plan made for another model
    ├── CacheError (ValueError)             a file that cannot be read as a cache or plan
    ├── ExportError (ValueError)            a plan that the target has no words for
    ├── MissingPackageError (ImportError)   an optional package is not installed
    ├── RankMismatchError (RuntimeError)    ranks that cannot end with the same plan
    ├── BenchError (RuntimeError)           a part of a benchmark that could not be run
    ├── PhaseError (RuntimeError)           a call that this phase does not allow
    └── CompiledTooEarlyError (RuntimeError)  traced by torch.compile before the freeze

Every message says what was found, what was expected and what to do.
"""

__all__ = [
    "AlreadyCompiledError",
    "BenchError",
    "CacheError",
    "CompiledTooEarlyError",
    "ConfigError",
    "ExportError",
    "Fp8TuneError",
    "MissingPackageError",
    "ModelError",
    "PhaseError",
    "PlanMismatchError",
    "RankMismatchError",
    "UnknownRecipeError",
    "in_short",
]


class Fp8TuneError(Exception):
    """Base of every error that fp8tune raises on purpose."""


class ConfigError(Fp8TuneError, ValueError):
    """An argument has a value that cannot be right."""


class UnknownRecipeError(ConfigError):
    """A recipe was asked for by a name that nobody registered."""


class ModelError(Fp8TuneError, ValueError):
    """The model cannot be tuned as it is."""


class AlreadyCompiledError(ModelError):
    """The model was compiled before the tuner could see its Linears being called."""


class PlanMismatchError(Fp8TuneError, ValueError):
    """A plan was applied to a model whose Linears are not those of the plan."""


class CacheError(Fp8TuneError, ValueError):
    """A file cannot be read as what it should be; the message says where and why."""


class ExportError(Fp8TuneError, ValueError):
    """What the plan says cannot be said in the words of the target."""


class MissingPackageError(Fp8TuneError, ImportError):
    """An optional package is not installed; the message says what to install."""


class RankMismatchError(Fp8TuneError, RuntimeError):
    """Ranks that must end with the same plan hold different layers or settings."""


class BenchError(Fp8TuneError, RuntimeError):
    """A part of a benchmark could not be run."""


class PhaseError(Fp8TuneError, RuntimeError):
    """A call or a transition that the current phase does not allow."""


class CompiledTooEarlyError(Fp8TuneError, RuntimeError):
    """The model was called under ``torch.compile`` while it was still being tuned."""


def in_short(error: Exception) -> str:
    """The kind of an error, and what it says first, to be quoted in another."""
    first_line = str(error).strip().split("\n", 1)[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"
