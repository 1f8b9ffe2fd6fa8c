"""What `prepare_recipes.py` makes: data out of packages, and models trained on it."""
