"""Planning: what a recipe will take, before it runs, and which recipes fit what there is."""
