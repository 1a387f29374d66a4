// `lorad-bench roofline`: the operations of one model step on the CPU backend, timed one by one and
// held against max(bytes / bandwidth, flops / peak) of this machine, measured in the same run.
#ifndef LORAD_BENCH_ROOFLINE_H
#define LORAD_BENCH_ROOFLINE_H

// argv[0] is the subcommand. Returns the process's exit status.
int roofline_main(int argc, char **argv);

#endif
