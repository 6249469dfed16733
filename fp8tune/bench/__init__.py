"""The benchmark behind ``fp8tune bench``: policies raced on blocks of published models."""

__all__: list[str] = []
