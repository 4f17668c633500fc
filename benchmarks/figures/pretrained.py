"""Draw how the pretrained model ranks pairs after training, from the results that its tables are made from.

    python -m benchmarks.figures.pretrained

DPO's rate was tuned later than those of the other losses of the first picture, so its runs are in a file of their own.

Depends on matplotlib, benchmarks.record, benchmarks.tables, and on benchmarks.studies.
"""

import matplotlib

from benchmarks.record import RESULTS, write_picture
from benchmarks.studies.report import metric_at, plot_seeds
from benchmarks.studies.studies import CHOSEN_LOGP, RANKING, SIMPO
from benchmarks.studies.sweep import Run
from benchmarks.tables import CHANGE, PRETRAINED_CHANGE_FILE, PRETRAINED_FILES, load, merge

matplotlib.use("Agg")  # draws without a display, which servers do not have
import matplotlib.pyplot as plt


def main() -> None:
    """Write the two pictures."""
    runs = [Run.from_json(entry) for entry in merge(*PRETRAINED_FILES)["runs"]]
    figure = plt.figure(figsize=(11, RANKING.picture_height))
    RANKING.draw(figure, runs)
    figure.suptitle(RANKING.question, fontsize=11)
    figure.tight_layout()
    write_picture(RESULTS / "pretrained.png", figure)

    study = load(PRETRAINED_CHANGE_FILE)
    trained = [run for run in map(Run.from_json, study["runs"]) if run.treatment in study["treatments"]]
    figure, (change_axes, logp_axes) = plt.subplots(1, 2, figsize=(11, 2.6), sharey=True)
    plot_seeds(change_axes, trained, metric_at(CHANGE), "share of held-out pairs ranked correctly by the change", SIMPO)
    plot_seeds(logp_axes, trained, CHOSEN_LOGP, "log-prob of their chosen answers, nats per token", SIMPO)
    change_axes.invert_yaxis()  # the panels share this axis, which the second one has turned back
    figure.tight_layout()
    write_picture(RESULTS / "pretrained_change.png", figure)


if __name__ == "__main__":
    main()
