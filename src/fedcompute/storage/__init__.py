"""The database (tasks, iterations, assignments, batches, releases, secrets, leases) and the blob store."""
