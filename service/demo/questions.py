"""What the demo asks: both lanes, all formats, hot and cold data in one query, and two queries that must fail."""

from dataclasses import dataclass, field

from queryd.events import ErrorCode, Mode, OutputFormat, Parameter


@dataclass(frozen=True, slots=True)
class Question:
    """One request of the demo, and how it must end: `rows` where the data says how many, `error` where it must fail."""

    title: str
    sql: str | None
    mode: Mode = Mode.INTERACTIVE
    output_format: OutputFormat = OutputFormat.PARQUET
    parameters: dict[str, Parameter] = field(default_factory=dict)
    saved: bool = False
    timeout_seconds: int | None = None
    rows: int | None = None
    error: ErrorCode | None = None


SAVED_NAME = "flights to a destination"
SAVED_SQL = """
SELECT month, count(*) AS flights, round(avg(arr_delay), 1) AS mean_delay
FROM flights WHERE dest = $dest GROUP BY month ORDER BY month
"""

_BATCH, _CSV, _JSON = Mode.BATCH, OutputFormat.CSV, OutputFormat.JSON

QUESTIONS = (
    Question(
        "how many flights, how many departed",
        "SELECT count(*) AS flights, count(dep_time) AS departed FROM flights",
        rows=1,
    ),
    Question(
        "carriers by mean delay (S3 and Postgres)",
        """SELECT a.name, count(*) AS flights, round(avg(f.arr_delay), 2) AS mean_delay
           FROM flights f JOIN airlines a USING (carrier) GROUP BY a.name ORDER BY mean_delay DESC""",
        output_format=_CSV,
        rows=16,
    ),
    Question(
        "the busiest routes (S3 and Postgres)",
        """SELECT f.origin, p.name AS destination, count(*) AS flights
           FROM flights f JOIN airports p ON p.faa = f.dest GROUP BY ALL ORDER BY flights DESC LIMIT 20""",
        output_format=_JSON,
        rows=20,
    ),
    Question(
        "the worst day of each month (window)",
        """SELECT month, day, mean_delay FROM (
             SELECT month, day, round(avg(dep_delay), 1) AS mean_delay,
                    rank() OVER (PARTITION BY month ORDER BY avg(dep_delay) DESC) AS place
             FROM flights GROUP BY month, day)
           WHERE place = 1 ORDER BY month""",
        rows=12,
    ),
    Question(
        "delay after wind (S3 and Postgres)",
        """SELECT CASE WHEN w.wind_speed >= 25 THEN 'strong' WHEN w.wind_speed >= 12 THEN 'fresh' ELSE 'light' END
                    AS wind, count(*) AS flights, round(avg(f.dep_delay), 1) AS mean_delay
           FROM flights f JOIN weather w ON w.origin = f.origin AND w.time_hour = f.time_hour
           WHERE w.wind_speed IS NOT NULL GROUP BY wind ORDER BY mean_delay DESC""",
        output_format=_CSV,
        rows=3,
    ),
    Question("saved query, to Boston", None, parameters={"dest": "BOS"}, saved=True, rows=12),
    Question("saved query, to Los Angeles", None, parameters={"dest": "LAX"}, saved=True, output_format=_JSON, rows=12),
    Question(
        "flights of a carrier on a day (parameters)",
        """SELECT flight, origin, dest, dep_delay FROM flights
           WHERE carrier = $carrier AND month = $month AND day = $day ORDER BY dep_delay DESC NULLS LAST, flight""",
        parameters={"carrier": "UA", "month": 7, "day": 4},
        output_format=_CSV,
        rows=130,
    ),
    Question(
        "the oldest planes still flying (S3 and Postgres)",
        """SELECT p.tailnum, p.year AS built, p.manufacturer, count(*) AS flights
           FROM planes p JOIN flights f USING (tailnum) WHERE p.year IS NOT NULL
           GROUP BY ALL ORDER BY built, p.tailnum LIMIT 10""",
        output_format=_JSON,
        rows=10,
    ),
    Question("every flight, exported", "SELECT * FROM flights", mode=_BATCH, rows=336_776),
    Question(
        "running total of departures (window)",
        """SELECT month, day, sum(count(dep_time)) OVER (ORDER BY month, day) AS departed
           FROM flights GROUP BY month, day ORDER BY month, day""",
        mode=_BATCH,
        output_format=_CSV,
        rows=365,
    ),
    Question(
        "airports without a flight (Postgres)",
        "SELECT faa, name FROM airports WHERE faa NOT IN (SELECT dest FROM flights) ORDER BY faa",
        mode=_BATCH,
        output_format=_JSON,
        rows=1_357,
    ),
    Question(
        "a mistake: no such column",
        "SELECT departure_gate FROM flights",
        error=ErrorCode.QUERY_ERROR,
    ),
    Question(
        "a query that exceeds its 2 s",
        "SELECT count(*) FROM flights a, flights b WHERE a.distance * b.air_time % 7 = 3",
        mode=_BATCH,
        timeout_seconds=2,
        error=ErrorCode.QUERY_TIMEOUT,
    ),
)
