"""The device runtime: check-in, local training, encrypted upload; and the developer's worker API."""
