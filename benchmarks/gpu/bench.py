"""Times the operators on a GPU against torch's and other packages'; results are added to check.py's JSON.

python -m benchmarks.gpu.bench --out out/gpu_check.json --section linear --seconds 60
python -m benchmarks.gpu.bench --out out/gpu_check.json --section linear --seconds 60 --rehearse     the same on small CPU tensors

Ceilings come first: copy, read-only stream, an empty graph, a bfloat16 product. A time is a call's share of a replayed CUDA graph,
whose calls go to different buffers that together exceed the L2 cache; contenders are replayed in turns. Every result is checked
against the case's reference before it is timed. Read next: cases.py, record.py.
"""

import argparse
import functools
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common.contenders import in_one_line
from benchmarks.gpu import cases
from benchmarks.gpu.record import Record
from quant_ops.report.error import sqnr
from quant_ops.report.timing import in_turns

ROTATE_BYTES = 160 << 20  # well over twice the largest L2 cache
MOST_SETS = 64
TURN_US = 2000  # of replays, per contender and round
ROUNDS = 7
INT8_PEAK = {"H100": 1979e12, "H200": 1979e12, "A100": 624e12, "L40S": 733e12}  # dense operations a second, by the vendor


class Timer:
    """Microseconds of single calls."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"

    def sets(self, size: int) -> int:
        return min(MOST_SETS, -(-ROTATE_BYTES // max(size, 1))) if self.on_gpu else 2

    def prepare(self, calls):
        """(what runs all calls once, what must be kept for as long as that is used)"""
        if not self.on_gpu:
            return lambda: [call() for call in calls], None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [*calls[:2], calls[0]]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        # Every call has its own output. The calls hold tensors that the graph reads. Without them the next capture, which empties
        # the allocator's cache, would unmap their memory.
        return graph.replay, (results, calls)

    def turn(self, replay, repeats: int) -> float:
        """Microseconds of `repeats` replays."""
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                replay()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def interleave(self, replays, calls: int) -> dict[str, list[float]]:
        """Microseconds of a call, one figure a round; the contenders are replayed in turns."""

        def turn(replay, repeats: int) -> list[float]:
            self.turn(replay, 1)  # brings the clock and the caches to this contender's state
            return [self.turn(replay, repeats) / repeats / calls]

        turns = {}
        for name, replay in replays.items():
            repeats = max(1, round(TURN_US / max(self.turn(replay, 1), 1.0))) if self.on_gpu else 1
            turns[name] = functools.partial(turn, replay, repeats)
        return in_turns(turns, rounds=ROUNDS if self.on_gpu else 1, order=random.Random(0))

    def once(self, make, call, size: int) -> float:
        """Median for a single contender."""
        problems = [make() for _ in range(self.sets(size))]
        replay, keep = self.prepare([lambda p=p: call(*p) for p in problems])
        times = self.interleave({"": replay}, len(problems))[""]
        del keep
        return statistics.median(times)


# ---- ceilings ----------------------------------------------------------------------------------------------------------


def ceilings(record: Record, timer: Timer, device: str) -> None:
    def add(what: str, us: float, **figures: float) -> None:
        record.data["ceilings"].append({"what": what, "us": us, **figures})
        record.save()

    def buffer(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device).random_()

    one = torch.zeros(1, device=device)
    add("empty graph node", timer.once(lambda: (one,), lambda a: a.add_(1), ROTATE_BYTES // MOST_SETS))
    for megabytes in (1, 4, 16, 64, 256, 2048) if timer.on_gpu else (1,):
        size = megabytes << 20  # read and written together
        us = timer.once(
            lambda n=size // 2: (buffer(n), torch.empty(n, dtype=torch.uint8, device=device)), lambda a, b: b.copy_(a), size
        )
        add(f"copy, {megabytes} MiB moved", us, gb_s=size / us / 1e3)
    size = (2048 if timer.on_gpu else 1) << 20
    us = timer.once(lambda: (torch.randn(size // 4, device=device),), lambda a: a.amax(), size)
    add(f"read-only stream, {size >> 20} MiB", us, gb_s=size / us / 1e3)
    n = 8192 if timer.on_gpu else 64
    us = timer.once(
        lambda: tuple(torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2)), torch.matmul, 6 * n * n
    )
    add(f"bfloat16 product of {n} x {n} x {n}", us, tera_ops=2 * n**3 / us / 1e6)


def floor_us(record: Record, case: cases.Case) -> float:
    """The largest of three times: the bytes at the best copy rate, the operations at the vendor's int8 peak, one launch."""
    measured = record.data["ceilings"]
    rate = max((c["gb_s"] for c in measured if c["what"].startswith("copy")), default=None)
    times = [c["us"] for c in measured if c["what"] == "empty graph node"]
    times += [case.bytes / rate / 1e3] if rate else []
    gpu = record.data["machine"].get("gpu") or ""
    times += [case.ops / peak * 1e6 for name, peak in INT8_PEAK.items() if name in gpu]
    return max(times, default=0.0)


# ---- cases -------------------------------------------------------------------------------------------------------------


def first(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def run_case(case: cases.Case, record: Record, timer: Timer, compiling: bool) -> None:
    problems = [case.make() for _ in range(timer.sets(case.bytes))]
    reference = first(case.contenders[case.reference](problems[0])())
    replays, kept = {}, []
    for name, contender in case.contenders.items():
        if name in case.compiled and not compiling:
            continue
        try:
            calls = [contender(p) for p in problems]
            distance = sqnr(reference.float(), first(calls[0]()).float())
            if not distance > cases.LEAST_SQNR:
                raise ArithmeticError(f"{distance:.1f} dB from {case.reference}, expected more than {cases.LEAST_SQNR:.0f}")
            replays[name], keep = timer.prepare(calls)
            kept.append(keep)
        except Exception as error:  # which contenders cannot do the case is part of the picture
            record.data["missing"].setdefault(name, {})[f"{case.stem} {case.set} {case.shape}"] = in_one_line(error)[:250]
    floor = floor_us(record, case)
    for name, times in timer.interleave(replays, len(problems)).items():
        ordered = sorted(times)
        record.data["results"].append(
            {"stem": case.stem, "set": case.set, "shape": case.shape, "dtype": case.dtype, "contender": name}
            | {"min_us": round(ordered[0], 3), "median_us": round(statistics.median(ordered), 3), "max_us": round(ordered[-1], 3)}
            | {"floor_us": round(floor, 3), "bytes": case.bytes, "ops": case.ops, "kernel": case.kernel}
        )
    record.save()


def run_section(section: str, record: Record, timer: Timer, options: argparse.Namespace, stop: float) -> None:
    device = "cuda" if timer.on_gpu else "cpu"
    if section == "ceilings":
        ceilings(record, timer, device)
        return
    for case in cases.SECTIONS[section](device, options.rehearse):
        if time.monotonic() > stop:
            record.data["cut"].append(f"{section} from {case.stem} {case.set} {case.shape} on: time was up")
            break
        try:
            run_case(case, record, timer, not options.no_compile)
        except Exception as error:  # of the data or the reference; the other rows still run
            record.data["missing"].setdefault("all", {})[f"{case.stem} {case.set} {case.shape}"] = str(error)[:300]
    record.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that check.py began")
    parser.add_argument("--section", choices=["ceilings", *cases.SECTIONS], nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="rows that would start later are left out")
    parser.add_argument("--rehearse", action="store_true", help="small tensors on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's contenders out")
    options = parser.parse_args()
    stop = time.monotonic() + options.seconds
    torch.manual_seed(0)
    if options.rehearse:
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one compilation a case
    torch.backends.cudnn.benchmark = True  # cuDNN at its best
    record, timer = Record(options.out, fresh=False), Timer("cpu" if options.rehearse else "cuda")
    with torch.inference_mode():
        for section in options.section:
            run_section(section, record, timer, options, stop)
    wrong = {name: why for name, why in record.data["missing"].items() if name.startswith("ours") or name == "all"}
    if wrong:
        raise SystemExit(f"expected every case of ours to run and to be right, got {wrong}")


if __name__ == "__main__":
    main()
