"""Plots what each round measured: the published tutorial's script (step 8), changed only where it reads.

The tutorial reads every round's metrics from a Google Cloud Storage bucket; `load_metrics` reads them from there, from
a server, or from a server's data directory, and goes on where a round is missing. The rest is as published: a list of
values per metric, one figure per metric, x the number of the round.

    python samples/plot_metrics.py
"""

import matplotlib.pyplot as plt

from fedcompute.monitoring import load_metrics

# The population_name of the task configuration (step 3).
POPULATION_NAME = "my_new_population"
# Where the metrics lie: a server's URL, its data directory, or a bucket (step 1).
GCS_BUCKET_NAME = "http://localhost:8080"
NUM_TRAINING_ROUND = 1000

metrics = load_metrics(GCS_BUCKET_NAME, POPULATION_NAME, rounds=NUM_TRAINING_ROUND)

for metric_name in metrics:
    print(metric_name)
    plt.plot(metrics[metric_name])
    plt.show()
