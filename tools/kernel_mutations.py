#!/usr/bin/env python3
"""Breaks the CUDA kernels and what queues them on purpose, and shows what the emulation says.

    tools/kernel_mutations.py [--build DIR] [--only TEXT]     rewrites the table of docs/kernels.md

For each mutation: the sources of kernels/cuda are copied, one is changed and compiled as the emulation
does (tests/emulation), and the test named runs: "operations" is test_cuda_operations, "streams" the
same with LORAD_CUDA_OVERLAP=1, "model" test_cuda_model. --build has the rest, built. Exits 1 when one
no longer applies or survives.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
O, S, M = "operations", "streams", "model"
BARRIER = "    __syncthreads();\n"

# what, file, what is there (and which one, from 0), what is put there, test
MUTATIONS = [
    ("embed: wrong index", "elementwise", "i % (size_t)hidden]);", "(i + 1) % (size_t)hidden]);", O),
    ("rms_norm: barrier between the warps' sums left out", "elementwise", BARRIER, "", O),
    ("rms_norm: the last warp's sum left out", "elementwise", "i < ROW_THREADS / WARP; i++)",
     "i < ROW_THREADS / WARP - 1; i++)", O),
    ("rope: sign of the sine", "elementwise", "first * cosine - second * sine",
     "first * cosine + second * sine", O),
    ("kv write: wrong slot in the page", "elementwise", "slot % PAGE_TOKENS) * (size_t)D",
     "(slot + 1) % PAGE_TOKENS) * (size_t)D", O),
    ("kv write: rows that nobody reads are written", "elementwise", "head >= Q && slot >= 0",
     "head >= Q", M),
    ("silu: row stride of one half", "elementwise", "gate_up[row * 2 * (size_t)ffn + column]",
     "gate_up[row * (size_t)ffn + column]", O),
    ("gather: first element shifted", "elementwise", "x[(size_t)rows[i / (size_t)hidden]",
     "x[1 + (size_t)rows[i / (size_t)hidden]", O),
    ("pool_write: last elements left out", "elementwise", "for (size_t i = 0; first + i < elems; i++)",
     "for (size_t i = 1; first + i < elems; i++)", O),
    ("pool_write: pages beyond the first list are the first's", "elementwise",
     "pages += page_list::COUNT) {", "pages += 0) {", O),
    ("pages: a division that is off at their ends", "primitives.cuh", "+ n) >> by.shift",
     "+ n + 1) >> by.shift", O),

    ("shrink, plain: barrier after x is loaded left out", "lora", "        __syncthreads();\n", "", O),
    ("shrink, plain: barrier before x is overwritten left out", "lora",
     ("        __syncthreads();\n", 1), "", O),
    ("shrink, plain: last elements of a piece left out", "lora", "bool there = t < count && k < depth;",
     "bool there = t < count && k + 1 < depth;", O),
    ("shrink, plain: tokens of an item beyond the first eight left out", "lora",
     "t < work.count; t += TILE)\n        shrink", "t < 1; t += TILE)\n        shrink", O),
    ("expand, plain: barrier after v is loaded left out", "lora", (BARRIER, 2), "", O),
    ("expand, plain: barrier before v is overwritten left out", "lora", "if (t > 0) __syncthreads();",
     "", O),
    ("expand, plain: the last panel taken for a whole one", "lora",
     "target.out - panel < LORA_PANEL ? target.out - panel : LORA_PANEL", "LORA_PANEL", O),
    ("expand, plain: the panel's place without its rank", "lora", "(panel * rank + column - panel)",
     "(column)", O),
    ("expand, plain: last ranks left out", "lora", "r < rank && column < target.out; r += AHEAD",
     "r + AHEAD < rank && column < target.out; r += AHEAD", O),
    ("expand, plain: writes past the last column", "lora", "if (column + i < target.out) y[i]",
     "y[i]", O),

    ("modules: only the last segment's count", "step_plan", "counts->lora_modules |=",
     "counts->lora_modules =", O),
    ("marks: not taken anew from a recording", "marks", "b->recording ? cudaEventRecordExternal",
     "false ? cudaEventRecordExternal", O),

    ("tiles: halves of a pair swapped", "tiles.cuh", "(x & 0xffffu) | y << 16", "(y & 0xffffu) | x << 16",
     O),
    ("tiles: depths of the second step taken twice", "tiles.cuh",
     "b.word[2 * step], b.word[2 * step + 1]", "b.word[step], b.word[step + 1]", O),
    ("tiles: rows of 16 in another order than v's", "tiles.cuh", "lane % 4 * 2 + i % 2 + i / 2 * 8",
     "lane % 4 * 4 + i", O),
    ("tiles: a lane's columns begin elsewhere", "tiles.cuh", "return lane % 4 * 16;",
     "return lane % 4 * 8;", O),
    ("shrink, tiles: barrier before the warps' sums are added left out", "lora_tiles", BARRIER, "", O),
    ("shrink, tiles: the second eight ranks taken for the first", "lora_tiles",
     "int at = rank_first + tile * 8 + r;", "int at = rank_first + r;", O),
    ("shrink, tiles: a warp's depth forgotten", "lora_tiles", "w < SHRINK_WARPS; w++)",
     "w < SHRINK_WARPS - 1; w++)", O),
    ("shrink, tiles: x beyond the first depth left out", "lora_tiles",
     "(in + DEPTH - 1) / DEPTH", "1", O),
    ("shrink, tiles: reads past the last depth", "lora_tiles",
     "(uint32_t)(depth + 1) * DEPTH < in ? (uint32_t)(depth + 1) * DEPTH : in",
     "(uint32_t)(depth + 1) * DEPTH", O),
    ("expand, tiles: barrier after v is added up left out", "lora_tiles", (BARRIER, 1), "", O),
    ("expand, tiles: one partial v alone", "lora_tiles", "depth < depths && at < rank",
     "depth < 1 && at < rank", O),
    ("expand, tiles: v of ranks that are not there", "lora_tiles", "depth < depths && at < rank",
     "depth < depths", O),
    ("expand, tiles: v in one bf16", "lora_tiles",
     "        multiply_columns(sums, small, rows);\n", "", O),
    ("expand, tiles: ranks beyond 16 left out", "lora_tiles", "rows[i] = next[i];", ";", O),
    ("expand, tiles: the panel's place without its rank", "lora_tiles",
     "(uint32_t)((works ? panel : panels) * rank)", "(uint32_t)(works ? panel : panels)", O),
    ("expand, tiles: the request's weight forgotten", "lora_tiles", "four.x += weight *", "four.x +=",
     O),
    ("expand, tiles: a token too many", "lora_tiles", "if (!works || !(half ? high : low)) continue;",
     "if (!works) continue;", O),

    ("attention, plain: K of the last slot of a page", "attention",
     "head * PAGE_TOKENS + position % PAGE_TOKENS", "head * PAGE_TOKENS + PAGE_TOKENS - 1", O),
    ("attention, plain: earlier parts not rescaled", "attention",
     "sum * expf(sum_max - top)", "sum", O),
    ("attention, plain: barrier after q is loaded left out", "attention",
     ("    __syncthreads();\n    for (int first", 0), "    for (int first", O),
    ("attention, plain: barrier after scores left out", "attention",
     ("        __syncthreads();\n", 0), "", O),
    ("attention, plain: barrier after softmax left out", "attention",
     ("        __syncthreads();\n", 1), "", O),
    ("attention, plain: barrier after a part's values left out", "attention",
     ("        __syncthreads();\n", 2), "", O),
    ("attention, plain: barrier before a part's sums are merged left out", "attention",
     (BARRIER, 0), "", O),
    ("attention, plain: barrier after a part is merged left out", "attention", (BARRIER, 1), "", O),
    ("attention merge: last part left out", "attention", "part < work.parts; part++)",
     "part < work.parts - 1; part++)", O),
    ("attention merge: a draft's parts taken for its neighbour's", "attention",
     "work.partial + part * work.stride", "work.partial + part", O),

    ("attention, tiles: a token sees the next one", "attention_tiles",
     "work.context - work.count + t + 1 : 0", "work.context - work.count + t + 2 : 0", O),
    ("attention, tiles: a row's head taken for its token", "attention_tiles",
     "int t = row / s.G;\n    return", "int t = row % s.G;\n    return", O),
    ("attention, tiles: what is summed up is not brought to new maxima", "attention_tiles",
     "state->out[block][j][2 * row] *= before;", "", O),
    ("attention, tiles: sums are not brought to new maxima", "attention_tiles",
     "state->sum[row] * before + sum", "state->sum[row] + sum", O),
    ("attention, tiles: V that nobody wrote", "attention_tiles",
     "first + columns_row(lane, i) < end", "true", O),
    ("attention, tiles: the second eight positions' K taken for the first", "attention_tiles",
     "k + (half * 8 + r) * D", "k + r * D", O),
    ("attention, tiles: sums of a row's lanes not added", "attention_tiles",
     "state->sum[row] += warp_exchange(state->sum[row], 2);", "", O),
    ("attention, tiles: a warp stops before its last row's end", "attention_tiles",
     "row_limit(work, s, last - 1)", "row_limit(work, s, row_first)", O),
    ("attention, narrow: all warps walk the same pages", "attention_tiles",
     "work.first / PAGE_TOKENS + warp, WARPS,", "work.first / PAGE_TOKENS, WARPS,", O),
    ("attention, narrow: barrier before the merge left out", "attention_tiles", BARRIER, "", O),
    ("attention, narrow: a warp's share left out", "attention_tiles",
     "sum += share * warps.sum", "sum += warps.sum", O),
    ("attention, narrow: maxima leave in other units", "attention_tiles",
     "to[0] = top * 0.6931471805599453f;", "to[0] = top;", O),
    ("attention, narrow: partial results of a draft's tokens in one place", "attention_tiles",
     "work.partial + t, query", "work.partial, query", O),

    ("draw: barrier after the warps' peaks left out", "draw", BARRIER, "", O),
    ("draw: barrier after bins are cleared left out", "draw", (BARRIER, 1), "", O),
    ("draw: barrier after bins are counted left out", "draw", (BARRIER, 2), "", O),
    ("draw: barrier inside the scan left out", "draw", ("        __syncthreads();\n", 0), "", O),
    ("draw: barrier after the bin is found left out", "draw", ("        __syncthreads();\n", 2), "", O),
    ("draw: barrier before the next pass left out", "draw",
     "        __syncthreads(); // before the next pass overwrites them\n", "", O),
    ("draw: what lies before the bin forgotten", "draw",
     "for (int k = 0; k < 2; k++) before[k] = s.before[k][0];", "", O),
    ("draw: top_k keeps one more", "draw", "(uint64_t)draw->top_k - 1", "(uint64_t)draw->top_k", O),
    ("draw: top_p is a share of all, whatever top_k keeps", "draw",
     "draw_threshold(total, (double)draw->top_p)", "draw_threshold(totals[1], (double)draw->top_p)", O),
    ("draw: ties go to the highest id", "draw", "other_at < at", "other_at > at", O),
    ("draw: min_p forgotten", "draw", "draw->inverse_temperature, draw->min_p}",
     "draw->inverse_temperature, 0.0f}", O),

    ("a step: parts of a context end behind it", "step_plan",
     "first + PART < span->context ? first + PART : span->context", "first + PART", O),
    ("a step: a draft's tokens merge the same partial results", "step_plan",
     "at->partial + t, count, parts", "at->partial, count, parts", O),
    ("a step: later items of a segment begin at its first token", "step_plan",
     "                item.token += tile;\n", "", O),
    ("a step: adapters read each other's pages", "step_plan",
     "            used += segment->page_count;\n", "", O),
    ("a step: segments over one token not put into waves", "step_plan",
     "&& waves[before] >= wave)", "&& false)", O),
    ("a step: surplus rows have a place in the cache", "step_plan",
     "step->token_count, n->tokens, -1);", "step->token_count, n->tokens, 0);", M),
    ("a step: surplus items of attention are not marked", "step_plan",
     "    while (at.narrow < narrow_end) (at.narrow++)->token = -1;\n", "", M),
    ("a step: surplus items of LoRA are not marked", "step_plan", "items[made].token = -1;", "", M),
    ("a step: the block changes while it is copied", "step",
     '    cuda_check(b, cudaStreamSynchronize(b->stream), "a step");\n', "", O),
    ("recordings: found by rows alone", "step", "memcmp(&r->counts, counts, sizeof *counts) == 0",
     "memcmp(&r->counts, counts, 8) == 0", M),
    ("recordings: made of the first step of a shape", "step", "if (!r->graph && r->used > 0) {", "if (!r->graph) {", M),
    ("recordings: kept when scratch moves", "cuda_backend",
     "if (b->scratch[area].bytes < bytes) cuda_recordings_drop(b);", "", M),
    ("recordings: kept when the metadata's block moves", "step",
     "if (b->step_device.bytes < bytes + 1) cuda_recordings_drop(b);", "", M),
    ("recordings: metadata is not sent before a replay", "step",
     "    cuda_check(b, cudaMemcpyAsync(b->step_device.memory",
     "    if (!recording_find(b, &plan->counts)->graph)\n"
     "        cuda_check(b, cudaMemcpyAsync(b->step_device.memory", M),
    ("streams: shrink does not wait for x", "lora",
     'cuda_check(b, cudaStreamWaitEvent(b->side, b->fork), "an event");', "", S),
    ("streams: expand does not wait for shrink", "lora",
     'cuda_check(b, cudaStreamWaitEvent(b->stream, b->join), "an event");', "", S),
]


def run(command, **options):
    return subprocess.run(command, text=True, capture_output=True, **options)


def compile_source(source, tree):
    target = source.with_suffix(".o")
    made = run(["g++", "-x", "c++", "-std=gnu++17", "-D_GNU_SOURCE", "-DLORAD_EMULATE=1", "-O2",
                f"-I{tree}", "-c", str(source), "-o", str(target)])
    if made.returncode:
        raise RuntimeError(made.stderr)
    return target


def link(build, objects, test, target):
    """`test`'s own objects with these in place of the emulated library's."""
    text = run(["ninja", "-C", str(build), "-t", "commands", f"tests/emulation/{test}"]).stdout
    command = [line for line in text.splitlines() if f"-o tests/emulation/{test} " in line][-1]
    command = command.split("&&")[1].strip()
    command = re.sub(r"\S*liblorad_cuda_emulated\.a", " ".join(map(str, objects)), command)
    command = command.replace(f"-o tests/emulation/{test} ", f"-o {target} ")
    made = run(command, shell=True, cwd=build)
    if made.returncode:
        raise RuntimeError(made.stderr)


def first_words(output):
    """The sentence that a failing test ends with."""
    for pattern in r"emulation: (.*)", r"ERROR: (?!---)(.*)", r"(.*(?:differ|VERIFY|abort).*)":
        found = re.search(pattern, output)
        if found and "Test failed with exception" not in found.group(1):
            return found.group(1)[:150]
    return "a fault at the end of device memory" if "exception" in output or not output else "a crash"


def broken(source, there, put):
    """The source with the mutation; None where it does not apply."""
    text, which = source.read_text(), 0
    if isinstance(there, tuple):
        there, which = there
    at = -1
    for _ in range(which + 1):
        at = text.find(there, at + 1)
        if at < 0:
            return None
    return text[:at] + put + text[at + len(there):]


def try_one(mutation, build, clean):
    """The mutation's name, and what its test said; "": nothing; None: it does not apply."""
    try:
        return mutation[0], said_of(mutation, build, clean)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return mutation[0], None


def said_of(mutation, build, clean):
    _, name, there, put, test = mutation
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        cuda = tree / "kernels" / "cuda"
        shutil.copytree(ROOT / "kernels", tree / "kernels")
        for other in "base", "tests":
            (tree / other).symlink_to(ROOT / other)
        source = cuda / (name if "." in name else name + ".cu")
        text = broken(source, there, put)
        if text is None:
            return None
        source.write_text(text)
        objects = []
        for file in sorted(cuda.glob("*.cu")):
            changed = source.suffix == ".cuh" or file == source
            objects.append(compile_source(file, tree) if changed else clean[file.name])
        objects += [clean["emulate.cpp"], clean["streams.cpp"]]
        program = "test_cuda_model" if test == M else "test_cuda_operations"
        link(build, objects, program, tree / "program")
        environment = {**os.environ, "LORAD_CUDA_OVERLAP": "1" if test == S else "0"}
        for seed in "1", "2", "3":
            try:
                done = run([str(tree / "program")], timeout=300,
                           env={**environment, "EMULATE_SEED": seed})
            except subprocess.TimeoutExpired:
                return "no end"
            if done.returncode:
                return first_words(done.stdout + done.stderr)
        return ""


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    options.add_argument("--only", default="")
    chosen = options.parse_args()
    build = chosen.build.resolve()
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        shutil.copytree(ROOT / "kernels", tree / "kernels")
        shutil.copytree(ROOT / "tests" / "emulation", tree / "tests" / "emulation")
        (tree / "base").symlink_to(ROOT / "base")
        sources = [*sorted((tree / "kernels" / "cuda").glob("*.cu")),
                   *(tree / "tests" / "emulation" / n for n in ("emulate.cpp", "streams.cpp"))]
        clean = {source.name: compile_source(source, tree) for source in sources}
        todo = [m for m in MUTATIONS if chosen.only in m[0]]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda m: try_one(m, build, clean), todo))
    rows, bad = [], 0
    for what, said in results:
        bad += not said
        text = "no longer applies" if said is None else f"`{said}`" if said else "NOT CAUGHT"
        rows.append(f"| {what} | {text} |")
        print(rows[-1])
    if not chosen.only:
        path = ROOT / "docs" / "kernels.md"
        table = "\n".join(["<!-- mutations -->", "| mutation | what the test said |", "|---|---|",
                           *rows, "<!-- end -->"])
        path.write_text(re.sub(r"<!-- mutations -->.*?<!-- end -->", lambda _: table,
                               path.read_text(), flags=re.S))
    print(f"{len(results)} mutations, {len(results) - bad} caught, {bad} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
