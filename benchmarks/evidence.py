"""All runs behind docs/comparison.md by one command; started again, it goes on.

    python benchmarks/evidence.py SPEECH FACES OUT [--only resnet34 plane30 ...]

SPEECH holds wav/<speaker>/..., trials_test.txt and train_speakers.txt; FACES holds
images/<identity>/... and pairs_test.txt. About four hours on two cores. Each step is a command of
compare_losses.py or plane.py, printed before it runs, and leaves its table and pictures in OUT.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def steps(speech: Path, faces: Path, out: Path) -> dict[str, list[str]]:
    """Command by name, in the order of the page."""
    data = [f"--data_folder={speech}", f"--verification_file={speech / 'trials_test.txt'}"]
    data += ["--num_valid_speakers=0"]
    everyone = [f"--train_speakers={speech / 'train_speakers.txt'}"]
    third = out / "speakers10.txt"
    resnet = ["--precision=bf16", "--n_mels=40", "--embedding_dim=128", "--number_of_epochs=24"]
    resnet += ["--batch_size=32", "--lr_reference_batch=32"]
    smaller = ["--channels=64", "--attention_channels=32", "--cohort_utterances=0"]
    # planes take the same number of steps: 10 speakers have a third of the recordings
    twenty, as_many = ["--number_of_epochs=20"], ["--number_of_epochs=74", "--warmup_epochs=11"]
    speeds = ["--speeds=[1.0, 0.9, 1.1]"]  # three classes a speaker
    pairs = [f"--data_folder={faces}", f"--verification_file={faces / 'pairs_test.txt'}"]

    def compare(folder: str, recipe: str, model: str, *options: str) -> list[str]:
        command = ["compare_losses.py", recipe, "--models", model, "--output", str(out / folder)]
        if folder == "sparse":
            command += ["--losses", "qmargin"]
        return [*command, "--", *options]

    def plane(name: str, margins: list[str], *options: str) -> list[str]:
        return ["plane.py", "run", str(out / name), "--margins", *margins, "--", *data, *options]

    planes = [str(out / name) for name in ("plane10", "plane30", "plane90")]
    return {
        "ecapa": compare("ecapa", "speech", "ecapa", *data, *everyone),
        "sparse": compare("sparse", "speech", "ecapa", *data, *everyone, "--head=sparse"),
        "resnet34": compare("resnet34", "speech", "resnet34", *data, *everyone, *resnet),
        "plane30": plane("plane30", ["0.1", "0.2", "0.3"], *everyone, *smaller, *twenty),
        "plane90": plane("plane90", ["0.2"], *everyone, *smaller, *twenty, *speeds),
        "plane10": plane("plane10", ["0.2"], f"--train_speakers={third}", *smaller, *as_many),
        "classes": ["plane.py", "classes", *planes, "--picture", str(out / "classes.png")],
        "iresnet": compare("iresnet", "face", "iresnet", *pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speech", type=Path)
    parser.add_argument("faces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", help="some of the steps")
    args = parser.parse_args()
    speech, faces, out = (path.resolve() for path in (args.speech, args.faces, args.out))
    commands = steps(speech, faces, out)
    if unknown := set(args.only or []) - set(commands):
        parser.error(f"no step {', '.join(sorted(unknown))}; they are {', '.join(commands)}")
    out.mkdir(parents=True, exist_ok=True)
    speakers = (speech / "train_speakers.txt").read_text().split()
    (out / "speakers10.txt").write_text("\n".join(speakers[::3]) + "\n")
    for name in args.only or commands:
        script, *arguments = commands[name]
        print("python", f"benchmarks/{script}", *arguments, flush=True)
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
