"""
Speed and memory, ours beside the peers that are installed: python bench.py scan [--json=FILE]

    scan        the selective scan on this CPU, forward and backward, beside mambapy's parallel scan (pip install
                mambapy) and, with --loop, the loop over tokens that small reimplementations leave to autograd;
                each in a process of its own, so that peak memory is its own, too
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time

SHAPE = (8, 512, 512, 16)  # B, T, D, N


def scan_worker(which: str, repeats: int) -> dict:
    """Time `repeats` forward and backward passes in float32; peak memory is what this process grew by, in MB."""
    import resource

    import torch

    from model import selective_scan

    B, T, D, N = SHAPE
    torch.manual_seed(0)
    x, dt = torch.randn(B, T, D), torch.rand(B, T, D) * 0.1
    A, Bs, Cs = -torch.arange(1.0, N + 1).repeat(D, 1), torch.randn(B, T, N), torch.randn(B, T, N)
    inputs = [u.requires_grad_() for u in (x, dt, A, Bs, Cs)]

    def ours(x, dt, A, B, C):
        return selective_scan(x, dt, A, B, C)[0]

    def mambapy(x, dt, A, B, C):  # its own composition, with softplus as in ours
        from mambapy.pscan import pscan

        dt = torch.nn.functional.softplus(dt)
        decay, u = torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)
        return (pscan(decay, u) @ C.unsqueeze(-1)).squeeze(-1)

    def loop(x, dt, A, B, C):
        h, ys = x.new_zeros(len(x), *A.shape), []
        dt = torch.nn.functional.softplus(dt)
        decay, u = torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)
        for t in range(x.shape[1]):
            h = decay[:, t] * h + u[:, t]
            ys.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, 1)

    f = {"ours": ours, "mambapy": mambapy, "loop": loop}[which]
    f(*(u[:, :2] if u.dim() == 3 else u for u in inputs))  # imports and thread pools
    scale = 1024 if sys.platform != "darwin" else 1024**2  # ru_maxrss is in KiB, on a Mac in bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        y = f(*inputs)
        middle = time.perf_counter()
        y.sum().backward()
        times.append((middle - start, time.perf_counter() - middle))
        for u in inputs:
            u.grad = None
    total = sorted(a + b for a, b in times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale - before
    forward = sorted(a for a, _ in times)[repeats // 2]
    return {"name": which, "forward_s": forward, "total_s": total[repeats // 2],
            "spread_s": total[-1] - total[0], "peak_mb": peak, "threads": torch.get_num_threads()}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["scan"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop", action="store_true", help="scan: time the loop, too (minutes)")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(scan_worker(args.worker, args.repeats)))
        return
    names = ["ours"] + ["mambapy"] * bool(importlib.util.find_spec("mambapy")) + ["loop"] * args.loop
    rows = []
    for name in names:
        repeats = 1 if name == "loop" else args.repeats
        command = [sys.executable, __file__, "scan", f"--repeats={repeats}", f"--worker={name}"]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"selective scan, (B, T, D, N) = {SHAPE}, float32, {rows[0]['threads']} threads, median of {args.repeats}")
    print(f"{'':10}{'forward s':>12}{'fwd+bwd s':>12}{'spread s':>10}{'ratio':>8}{'peak MB':>10}")
    for r in rows:
        ratio = r["total_s"] / rows[0]["total_s"]
        print(
            f"{r['name']:10}{r['forward_s']:12.3f}{r['total_s']:12.3f}{r['spread_s']:10.3f}{ratio:8.2f}{r['peak_mb']:10.0f}"
        )
    if len(rows) == 1:
        print("pip install mambapy to see it beside ours")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
