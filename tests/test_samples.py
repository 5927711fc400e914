"""The samples in Python run as they are, after their constants are set."""

import json
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "samples" / "plot_metrics.py"
# Stands in for a person who looks at each figure: notes what it shows.
_LOOK = """
import json, matplotlib.pyplot as plt
shown = []
def show():
    shown.append([[float(x), float(y)] for x, y in plt.gca().lines[0].get_xydata()])
    plt.close()
plt.show = show
"""


def test_the_tutorial_s_script_draws_every_metric_of_a_real_run(finished_quickstart):
    text = SAMPLE.read_text()
    for name, value in (("POPULATION_NAME", "quickstart"), ("GCS_BUCKET_NAME", str(finished_quickstart.directory))):
        (line,) = [one for one in text.splitlines() if one.startswith(f"{name} = ")]
        text = text.replace(line, f"{name} = {value!r}")
    done = subprocess.run(
        [sys.executable, "-c", f"{_LOOK}\n{text}\nprint(json.dumps(shown))"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(finished_quickstart.directory)},
    )
    assert done.returncode == 0, done.stderr
    *names, shown = done.stdout.splitlines()
    files = {
        number: json.loads(
            (finished_quickstart.directory / f"blobs/model/quickstart/1/{number}/s/0/metrics").read_text()
        )
        for number in range(1, finished_quickstart.rounds + 1)
    }
    assert set(names) == set(files[1])
    assert json.loads(shown) == [[[number, values[name]] for number, values in files.items()] for name in names]
