"""Composing: a recipe becomes a plan, or one error that names every mistake and every clash."""
