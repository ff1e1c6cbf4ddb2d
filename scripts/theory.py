"""Check the propositions behind EMPG and AEM on softmax policies and on a language model; plot them.

1. EMPG: the expected squared norm of the score is ``1 - exp(-H2)``, H2 the Renyi entropy of order 2: exactly,
   and by sampling actions.
2. AEM: reinforcing one action moves entropy at the rate ``A (S - H)``: against the derivative of entropy
   along the natural-gradient flow that the law assumes, and, on the model, along a plain gradient step on its
   weights, where the law is an approximation.

The model is a small random decoder of this project, or any folder that it can load:
``python scripts/theory.py --model FOLDER --out theory.png``. Prints one JSON object with the
largest deviations.
"""

from __future__ import annotations

import argparse
import json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model; by default a small random one")
    parser.add_argument("--out", default="theory.png", help="file of the plot")
    parser.add_argument("--states", type=int, default=128, help="policies, and contexts of the model")
    parser.add_argument("--samples", type=int, default=4096, help="actions sampled for each expectation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from theory_measures import measure  # after --help: JAX takes seconds

    print(json.dumps(measure(arguments), indent=2))


if __name__ == "__main__":
    main()
