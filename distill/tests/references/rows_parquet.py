#!/usr/bin/env python3
"""Rows as a Parquet file, written by pyarrow as Hugging Face's datasets writes them: tests/fixtures/rows.parquet.

usage: rows_parquet.py FIXTURES      (needs pyarrow; made with 26.0)
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
schema = pa.schema([
    ("messages", pa.list_(message)), ("prompt", pa.string()), ("completion", pa.string()), ("text", pa.large_string()),
    ("language", pa.string()), ("score", pa.float64()), ("at", pa.timestamp("ms")),
])
turn = lambda role, content: {"role": role, "content": content, "name": None}
rows = [
    {"messages": [turn("user", "w9 w10"), turn("assistant", "w20 w21")], "language": "nl", "score": 0.5, "at": 1_700_000_000_000},
    {"prompt": "w5 w6 ", "completion": "w7 w8", "language": "fr"},
    {"text": "w30 w31 w32\nw33", "language": "fr"},
    {"language": "de"},  # no row: nothing to train on
    {"messages": [turn("system", "w11"), turn("user", "w12"), turn("assistant", "w13"), turn("user", "w14"),
                  turn("assistant", "w15")], "language": "de"},
]
table = pa.Table.from_pylist(rows, schema=schema)
# Two row groups, and the compression that the hub's files have.
pq.write_table(table, Path(sys.argv[1]) / "rows.parquet", compression="snappy", row_group_size=3)
