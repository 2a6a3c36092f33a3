"""Train the reference runs and keep the card and the picture of each beside this script.

python model_cards/make.py            # all of them, some minutes each on two cores
python model_cards/make.py clm images
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: the command of every reference run; each writes its own card
RUNS = {
    "clm": ["examples/run_clm_pc.py"],
    "mlm": ["examples/run_mlm_pc.py"],
    "classification": ["examples/run_classification_pc.py"],
    "images": ["examples/run_image_classification_pc.py"],
    "seq2seq": ["examples/run_seq2seq_pc.py"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="run", help=f"of {', '.join(RUNS)}; default: all")
    asked = parser.parse_args(argv).runs or list(RUNS)
    if unknown := set(asked) - set(RUNS):
        parser.error(f"{', '.join(sorted(unknown))} is unknown; allowed: {', '.join(RUNS)}")
    for name in asked:
        run = Path("runs") / "reference" / name
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, *RUNS[name], "--output_dir", str(run), "--report_to", "none"]
        subprocess.run(command, cwd=HERE.parent, env=environment, check=True)
        (HERE / name).mkdir(exist_ok=True)
        for file in ("README.md", "learning.png"):
            shutil.copyfile(HERE.parent / run / file, HERE / name / file)


if __name__ == "__main__":
    main()
