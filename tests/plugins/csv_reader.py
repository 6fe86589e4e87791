"""A reader: the documents of a .csv file are the cells of one column."""

import csv
import io

import minigpt


@minigpt.register("reader", ".csv", help="a document per row of a .csv file")
def read_csv(stream, settings, *, column: str = "text"):
    for row in csv.DictReader(io.TextIOWrapper(stream, "utf-8", newline="")):
        yield row[column]
