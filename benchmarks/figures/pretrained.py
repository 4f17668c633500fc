"""Draw how the pretrained model ranks pairs with tuned learning rates, from the results that its table is made from.

    python -m benchmarks.figures.pretrained

DPO's rate was tuned later than those of the other losses, so its runs are in a file of their own.

Depends on matplotlib, benchmarks.record, benchmarks.tables, and on benchmarks.studies.
"""

import matplotlib

from benchmarks.record import RESULTS, write_picture
from benchmarks.studies.studies import RANKING
from benchmarks.studies.sweep import Run
from benchmarks.tables import PRETRAINED_FILES, merge

matplotlib.use("Agg")  # draws without a display, which servers do not have
import matplotlib.pyplot as plt


def main() -> None:
    """Write the picture."""
    runs = [Run.from_json(entry) for entry in merge(*PRETRAINED_FILES)["runs"]]
    figure = plt.figure(figsize=(11, RANKING.picture_height))
    RANKING.draw(figure, runs)
    figure.suptitle(RANKING.question, fontsize=11)
    figure.tight_layout()
    write_picture(RESULTS / "pretrained.png", figure)


if __name__ == "__main__":
    main()
