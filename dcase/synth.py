"""Make SynthTAU, a synthetic data set in TAU22's layout, or impulse responses of synthetic devices.

python -m dcase.synth --out D
python -m dcase.synth --responses D
"""

from dataclasses import asdict
from pathlib import Path

from dcase.cli import parse
from dcase.data.synth import MARK, N_RESPONSES, SynthConfig, make, make_responses
from dcase.errors import run


def main() -> None:
    options = asdict(parse(SynthConfig, "Make SynthTAU, a synthetic data set in TAU22's layout."))
    out, responses = options.pop("out"), options.pop("responses")
    if out is not None:
        print(f"made SynthTAU (synthetic: see {MARK}) in {make(Path(out), **options)}")
    if responses is not None:
        print(f"made {N_RESPONSES} responses (synthetic: of no real device) in {make_responses(Path(responses))}")


if __name__ == "__main__":
    run(main)
