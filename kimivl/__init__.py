"""kimivl: post-training of vision-language models the way Kimi-VL was trained.

Importing this package costs nothing, so that the command line stays fast: Kimi-VL is registered with transformers
when transformers is imported, before or after. From then on its Auto classes read a Kimi-VL folder.
"""

from types import ModuleType

from wrapt import when_imported

__version__ = "0.1.0"


@when_imported("transformers")
def _register(transformers: ModuleType) -> None:
    """Called when transformers' root module is there; none of its others is half-imported then."""
    import kimivl.model  # noqa: F401
