"""`fedcompute metrics` on a tree of metrics files."""

import json

LOSS = "server.client_work.train.loss.png"


def test_one_png_per_metric_is_written_and_named(fedcompute, metrics_tree, tmp_path):
    out = tmp_path / "plots"
    result = fedcompute("metrics", "plot", metrics_tree, "--population", "digits", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.output.replace("\n", "") == str(out / LOSS)
    assert (out / LOSS).read_bytes().startswith(b"\x89PNG")


def test_the_names_of_the_published_script_are_options(fedcompute, metrics_tree, tmp_path):
    names = ["--population-name", "digits", "--gcs-bucket-name", metrics_tree, "--num-training-round", 1]
    result = fedcompute("metrics", "plot", *names, "--out", tmp_path / "plots", "--json")
    assert json.loads(result.output) == {"files": [str(tmp_path / "plots" / LOSS)]}


def test_runs_of_unequal_length_are_compared_in_one_chart(fedcompute, metrics_tree, tmp_path):
    compare = ["--compare", "noise 0.1=digits/1", "--compare", "noise 0.3=digits/2"]
    assert fedcompute("metrics", "plot", metrics_tree, *compare, "--out", tmp_path / "two").exit_code == 0
    assert fedcompute("metrics", "plot", metrics_tree, *compare[:2], "--out", tmp_path / "one").exit_code == 0
    assert (tmp_path / "two" / LOSS).read_bytes() != (tmp_path / "one" / LOSS).read_bytes()


def test_the_table_has_every_round_and_says_null(fedcompute, metrics_tree):
    result = fedcompute("metrics", "table", metrics_tree, "--population", "digits")
    assert [line.split() for line in result.output.splitlines()] == [
        ["round", "loss"], ["1", "1"], ["2", "null"], ["4", "0.5"],
    ]  # fmt: skip


def test_the_table_is_json_on_request(fedcompute, metrics_tree):
    result = fedcompute("metrics", "table", "--storage", metrics_tree, "--population", "digits", "--json")
    rounds = json.loads(result.output)
    assert [one["round"] for one in rounds] == [1, 2, 4]
    assert rounds[1]["metrics"] == {"server/client_work/train/loss": None}


def test_what_cannot_be_plotted_is_explained(fedcompute, metrics_tree):
    for arguments, words in (
        (["plot", metrics_tree], "no task is named"),
        (["plot", metrics_tree, "--compare", "digits/1"], "LABEL=POPULATION/TASK"),
        (["plot", metrics_tree, "--population", "nobody"], "no metrics of population 'nobody'"),
        (["plot", metrics_tree, "--storage", "/elsewhere", "--population", "digits"], "given twice"),
        (["table", metrics_tree / "missing", "--population", "digits"], "no directory"),
    ):
        result = fedcompute("metrics", *arguments)
        assert result.exit_code == 1
        assert words in result.stderr.replace("\n", " ")


def test_the_server_of_the_environment_is_asked(fedcompute, monkeypatch):
    monkeypatch.setenv("FEDCOMPUTE_SERVER", "http://localhost:1")
    assert "http://localhost:1" in fedcompute("metrics", "table", "--population", "digits").output


def test_metrics_are_exported_in_the_form_that_the_file_ends_with(fedcompute, metrics_tree, tmp_path):
    import pandas

    arguments = ["metrics", "export", metrics_tree, "--population", "digits", "--compare", "other=digits/2"]
    for name, read in (("m.csv", pandas.read_csv), ("m.parquet", pandas.read_parquet)):
        result = fedcompute(*arguments, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        frame = read(tmp_path / name)
        assert list(frame.columns) == ["run", "round", "metric", "value"]
        first = frame[frame.run == "digits/1"]
        assert list(first["round"]) == [1, 2, 4]
        assert list(first.value.fillna(-1)) == [1.0, -1, 0.5]
    refused = fedcompute(*arguments, "--out", tmp_path / "m.csv")
    assert refused.exit_code == 1
    assert "--force" in refused.stderr.replace("\n", " ")
    assert fedcompute(*arguments, "--out", tmp_path / "m.csv", "--force", "--wide").exit_code == 0
    assert "server/client_work/train/loss" in (tmp_path / "m.csv").read_text().splitlines()[0]
    assert fedcompute(*arguments, "--out", tmp_path / "m.xlsx").exit_code == 1
    assert [path.name for path in sorted(tmp_path.glob("*m.*"))] == ["m.csv", "m.parquet"]


def test_a_table_of_the_newest_rounds_has_no_others(fedcompute, metrics_tree):
    result = fedcompute("metrics", "table", metrics_tree, "--population", "digits", "--last", 1)
    assert [line.split() for line in result.output.splitlines()] == [["round", "loss"], ["4", "0.5"]]
