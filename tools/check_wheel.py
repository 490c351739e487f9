"""Build the wheel, check that it holds only `vidworld`, and run its command line from another directory.

A world that comes with the package is rolled out from there too.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROLLOUT = ["--frames", "1", "--samples", "1", "--device", "cpu", "--out", "rolled"]


def build_wheel(folder: Path) -> Path:
    """Build into `folder` with the environment's own hatchling, so that nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def top_levels(wheel: Path) -> set[str]:
    """First path components, metadata apart."""
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def main() -> None:
    """Exit with a message when the wheel is not what users should get."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        if top_levels(wheel) != {"vidworld"}:
            sys.exit(f"the wheel's top levels are {sorted(top_levels(wheel))}, expected only vidworld")
        unpacked, elsewhere = folder / "unpacked", folder / "elsewhere"
        zipfile.ZipFile(wheel).extractall(unpacked)
        elsewhere.mkdir()
        # -P keeps the working directory off the path, so that the unpacked wheel is what runs.
        code = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); import vidworld, vidworld.cli as cli; "
            "print(vidworld.__file__); raise SystemExit(cli.run(sys.argv[1:]))"
        )
        for arguments in (["--help"], ["shard", "--help"], ["rollout", "--help"], ["train", "--help"]):
            done = subprocess.run(
                [sys.executable, "-P", "-c", code, str(unpacked), *arguments],
                cwd=elsewhere,
                capture_output=True,
                text=True,
            )
            if done.returncode or str(unpacked) not in done.stdout:
                sys.exit(f"vidworld {' '.join(arguments)} failed from the wheel:\n{done.stdout}{done.stderr}")
        absent = "weights of 'lab' are not in this copy"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(unpacked), "rollout", "lab", *ROLLOUT],
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
        here = (ROOT / "vidworld" / "weights" / "lab" / "model.safetensors").is_file()
        if done.returncode != (0 if here else 2) or (not here and absent not in done.stderr):
            sys.exit(f"vidworld rollout lab failed from the wheel:\n{done.stdout}{done.stderr}")
        if not (unpacked / "vidworld" / "weights" / "lab" / "prompts" / "manifest.json").is_file():
            sys.exit("the wheel lacks the prompts of the lab")
        print(f"wheel check: {wheel.name} holds only vidworld and its command line runs")


if __name__ == "__main__":
    main()
