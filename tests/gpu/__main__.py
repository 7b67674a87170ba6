"""All of it, or the cases whose names start with an argument, with nothing but torch and triton:

python3 -m tests.gpu
python3 -m tests.gpu "small" "two graphs int4"
compute-sanitizer python3 -m tests.gpu small
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable, Sequence

import torch

from benchmarks import _bare

_bare.use()

from tests.gpu.cases import Case, cases  # noqa: E402
from tests.gpu.ground import Ground, gpu  # noqa: E402


def main(names: Sequence[str]) -> int:
    """The exit status: 0 if all passed, 1 if one failed or there is no GPU."""
    if not torch.cuda.is_available():
        print(f"tests/gpu: torch {torch.__version__} sees no CUDA GPU; nothing was run.", file=sys.stderr)
        return 1
    return run((case for case in cases() if not names or case.name.startswith(tuple(names))), gpu())


def run(chosen: Iterable[Case], ground: Ground) -> int:
    """One line a case."""
    passed, failed, left = 0, list[str](), 0
    for case in chosen:
        begun = time.perf_counter()
        if case.missing:
            left += 1
            print(f"left out  {case.name}: not installed: {', '.join(case.missing)}", flush=True)
            continue
        try:
            case.run(ground)
            passed += 1
            print(f"passed    {case.name}   {time.perf_counter() - begun:.1f} s", flush=True)
        except Exception as error:
            failed.append(case.name)
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"FAILED    {case.name}: {said}", flush=True)
    print(f"{passed} passed, {len(failed)} failed, {left} left out")
    for name in failed:
        print(f"    failed: {name}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
