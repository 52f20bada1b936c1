"""kimivl: post-training of vision-language models the way Kimi-VL was trained.

Importing this package imports nothing else, so that the command line stays fast;
``import kimivl.model`` registers the architecture with transformers.
"""

__version__ = "0.1.0"
