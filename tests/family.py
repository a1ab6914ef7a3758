"""The members of the GRPO family on the built-in task: grpo.py with each --loss and --advantage, seeds 1 to 10.

    python tests/family.py                 # 80 runs, about 50 minutes on one core; Ctrl-C, then the same again goes on

Everything but the flags named in the table is at its default. A run that has finished is not repeated (runs/family/).
Prints the README's table: medians over the seeds, in brackets the lowest and the highest; how many seeds lose a sum (see
`lost_sums` in ladder.py); the share of tokens that the clip takes out, over the whole run; the KL to the reference of a
whole completion in the last rollout, k1, in nats.
"""

import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import ladder
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(1, 11)
VARIANTS = [
    "--loss grpo",
    "--loss dr_grpo",
    "--loss dapo",
    "--loss dapo --dynamic-sampling --kl-coef 0",
    "--loss gspo",
    "--loss cispo",
    "--advantage rloo",
    "--advantage batch",
]


def run(flags, seed):
    """What TensorBoard holds of one run, name -> [[step, value], ...], and which sums its final policy has lost."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = ROOT / "runs/family" / f"{flags.replace('--', '').replace(' ', '_')}-{seed}"
    if not (folder / "final").exists():
        command = [sys.executable, "grpo.py", *flags.split(), "--seed", str(seed), "--eval-every", "10"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--output-dir", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, env=environment)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {name: [[point.step, point.value] for point in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return scalars | {"lost": ladder.lost_sums(folder / "final")}


def with_range(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main():
    sys.path.insert(0, str(ROOT))
    print("| flags | accuracy | easy | hard | lost a sum | steps to 0.9 | clipped | KL |\n|---|---|---|---|---|---|---|---|")
    bar = tqdm(total=len(VARIANTS) * len(SEEDS), unit="run", dynamic_ncols=True)
    for flags in VARIANTS:
        runs = []
        for seed in SEEDS:
            bar.set_description(f"{flags}, seed {seed}")
            runs.append(run(flags, seed))
            bar.update()
        final = {level: [some[f"eval/accuracy{level}"][-1][1] for some in runs] for level in ("", "_easy", "_hard")}
        needed = [next((step for step, value in some["eval/accuracy"] if value >= 0.9), math.inf) for some in runs]
        there, needed = sum(map(math.isfinite, needed)), statistics.median_high(needed)
        clipped = [statistics.mean(value for _, value in some["losses/clipfrac"]) for some in runs]
        kl = [some["objective/kl_seq"][-1][1] for some in runs if "objective/kl_seq" in some]
        cells = [f"`{flags}`", with_range(final[""], ".3f"), *(f"{statistics.median(final[x]):.3f}" for x in ("_easy", "_hard"))]
        cells += [f"{sum(bool(some['lost']) for some in runs)}", f"{there} of {len(SEEDS)} seeds" if math.isinf(needed) else f"{needed}"]
        cells += [f"{statistics.median(clipped):.3f}", f"{statistics.median(kl):.2f}" if kl else "-"]
        tqdm.write(f"| {' | '.join(cells)} |", file=sys.stdout)
    bar.close()


if __name__ == "__main__":
    main()
