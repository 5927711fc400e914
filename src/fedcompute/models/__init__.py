"""Models to train (FunctionalModel and its SavedModel form), sample models and federated sample data."""
