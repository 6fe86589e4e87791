"""A logger: every row of metrics to a .csv file in the run's folder."""

from lightning.pytorch.loggers import CSVLogger

import minigpt


@minigpt.register("logger", "csv", help="metrics.csv in the run's folder")
def csv_logger(run, config):
    return CSVLogger(run, name="", version="csv", flush_logs_every_n_steps=1)
