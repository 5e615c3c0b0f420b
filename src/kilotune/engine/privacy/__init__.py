"""Privacy: where a recipe's `privacy` meets the steps and rounds of a run."""
