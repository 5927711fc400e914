"""The life of a round: schedule, assign, collect, aggregate, update."""
