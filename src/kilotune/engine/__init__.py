"""The engine: recipes are composed, steps and rounds are run, models are loaded, measured and exported."""
