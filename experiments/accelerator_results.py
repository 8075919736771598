"""The JSON file of one accelerator. It is written after every row, so that a run that was cut off goes on where it was."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lbpwht_jax.runs.folder import write_json

Row = dict[str, Any]


def slug(device: str) -> str:
    """A device's name in lower case, letters and digits joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def read(file: Path) -> dict[str, Any]:
    """What has been measured so far."""
    return json.loads(file.read_text()) if file.exists() else {"parts": {}}


def begin(file: Path, machine: Mapping[str, Any], anew: tuple[str, ...] = ()) -> None:
    """Makes the file, or checks that it is of this device.

    Args:
      file: the JSON file.
      machine: what ``lbpwht_jax.bench.machine`` says.
      anew: parts whose results are dropped.

    Raises:
      ValueError: if the file holds measurements of another device.
    """
    results = read(file)
    device = results.setdefault("device", machine["device"])
    if device != machine["device"]:
        raise ValueError(f"{file} has measurements of {device}, and this is {machine['device']}; name another --output")
    parts = {name: part for name, part in results["parts"].items() if name not in anew}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"command": "python experiments/accelerator.py", "device": device, "parts": parts})


def missing(file: Path, part: str, names: Sequence[str]) -> list[str]:
    """Those of these rows that a part does not have yet."""
    done = {row["name"] for row in read(file)["parts"].get(part, {"rows": []})["rows"]}
    return [name for name in names if name not in done]


def forget(file: Path, part: str, unwanted: Callable[[Row], Any]) -> None:
    """Drops rows of a part, to be measured again."""
    results = read(file)
    if part in results["parts"]:
        here = results["parts"][part]
        here["rows"] = [row for row in here["rows"] if not unwanted(row)]
        write_json(file, results)


def fill(
    file: Path,
    part: str,
    facts: Mapping[str, Any],
    wanted: Mapping[str, Callable[[], Row]],
    minutes: float,
) -> list[Row]:
    """Measures those rows of a part that are missing, one after the other, and writes each as it comes.

    A row that the device's memory or compiler does not suffice for holds the error instead. Rows for which no time is left
    are listed in the part's ``left_out``; the next run begins with them.

    Args:
      file: the JSON file.
      part: its name.
      facts: on what the rows depend, beside the device; kept in the file.
      wanted: by the rows' names, what measures them.
      minutes: how long this may take; a row is begun if there is time for the longest one so far.

    Returns:
      All rows of the part.

    Raises:
      ValueError: if the part has rows that were measured with other facts.
    """
    results = read(file)
    here = results["parts"].setdefault(part, {"facts": dict(facts), "left_out": [], "seconds": 0.0, "rows": []})
    asked = json.loads(json.dumps(dict(facts)))
    differing = [name for name, value in asked.items() if name != "machine" and here["facts"].get(name) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{file}: the part {part} was measured with {name}={here['facts'].get(name)}, not {asked[name]}; measure it anew "
            "with --again, or name another --output"
        )
    done = {row["name"] for row in here["rows"]}
    here["left_out"] = [name for name in dict.fromkeys([*wanted, *here["left_out"]]) if name not in done]
    write_json(file, results)
    before, started, longest = here["seconds"], time.perf_counter(), 0.0
    for name in [name for name in here["left_out"] if name in wanted]:
        begun = time.perf_counter()
        if begun + longest > started + 60 * minutes:
            break
        row = _row(name, wanted[name])
        here["rows"].append(row)
        here["left_out"].remove(name)
        ended = time.perf_counter()
        longest = max(longest, ended - begun)
        here["seconds"] = before + ended - started
        write_json(file, results)
        print(f"{part}: {name} ({ended - begun:.0f} s){': ' + row['failed'] if 'failed' in row else ''}", flush=True)
    for name in here["left_out"]:
        print(f"{part}: no time for {name}; the next run begins with it", flush=True)
    return here["rows"]


def _row(name: str, measure: Callable[[], Row]) -> Row:
    try:
        return {"name": name, **measure()}
    except jax.errors.JaxRuntimeError as error:
        return {"name": name, "failed": str(error).strip().splitlines()[0][:300]}
