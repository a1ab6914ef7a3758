"""Draws the README's picture: held-out accuracy of the default runs of grpo.py and ppo.py, seeds 1 to 10.

    python tests/learning_curve.py            # twenty runs, one after the other, about 20 minutes

A run that has finished is not repeated (runs/learning_curve/). Writes .github/learning_curve.png and .json, and prints
accuracy before and after and the seconds of every run. Needs matplotlib.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = range(1, 11)
COLOURS = {"grpo": "#0b6bcb", "ppo": "#d9730d"}


def run(script, seed):
    """The done line of one default run, and its accuracies as [step, all, easy, hard]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = ROOT / "runs/learning_curve" / f"{script}-{seed}"
    if not (folder / "done").exists():
        command = [sys.executable, f"{script}.py", "--seed", str(seed), "--eval-every", "10", "--output-dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        (folder / "done").write_text(done)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    columns = [events.Scalars(f"eval/accuracy{level}") for level in ("", "_easy", "_hard")]
    return (folder / "done").read_text(), [[a.step, a.value, b.value, c.value] for a, b, c in zip(*columns)]


def draw(curves):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, (script, runs) in zip(axes, curves.items()):
        steps = [point[0] for point in runs[0]]
        for column, label, style in ((2, "easy sums", "--"), (1, "all", "-"), (3, "hard sums", ":")):
            values = [sorted(run[i][column] for run in runs) for i in range(len(steps))]
            axis.plot(steps, [statistics.median(v) for v in values], style, color=COLOURS[script], label=label, linewidth=2)
            if column == 1:
                axis.fill_between(steps, [v[0] for v in values], [v[-1] for v in values], color=COLOURS[script], alpha=0.2)
        axis.set(title=f"{script}.py", xlabel="step (256 completions each)", ylim=(0, 1.01))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", frameon=False)
    axes[0].set_ylabel("held-out accuracy (greedy)")
    figure.savefig(ROOT / ".github/learning_curve.png", dpi=110)


def main():
    curves = {}
    for script in COLOURS:
        curves[script] = []
        for seed in SEEDS:
            done, curve = run(script, seed)
            print(f"{script}.py seed {seed}: {done.split(' run=')[0]} easy={curve[-1][2]:.3f} hard={curve[-1][3]:.3f}", flush=True)
            curves[script].append(curve)
    (ROOT / ".github").mkdir(exist_ok=True)
    (ROOT / ".github/learning_curve.json").write_text(json.dumps(curves))
    draw(curves)


if __name__ == "__main__":
    main()
