"""The task builder: a saved model and a task configuration become plans, checkpoints and task rows."""
