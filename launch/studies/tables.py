"""All runs of a study as CSV and JSON."""

import csv
import io

from . import files


def write_runs(folder, rows, **more):
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_text(folder / "results.csv", text.getvalue())
    files.write_json(folder / "results.json", {
        "format": "drover-study-results", "format_version": 1, "runs": rows, **more})
