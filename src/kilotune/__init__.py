"""kilotune: fine-tune a language model on one small device, or together over many, for kilobytes."""

__version__ = "0.1.0"
