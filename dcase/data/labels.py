"""The scenes and recording devices of TAU22, by name and number."""

# Fixed here and never derived from a csv, so that an index means the same in every checkpoint and on every subset.
SCENES = (
    "airport",
    "bus",
    "metro",
    "metro_station",
    "park",
    "public_square",
    "shopping_mall",
    "street_pedestrian",
    "street_traffic",
    "tram",
)
DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
