// Weight matrices that a checkpoint holds as packed 4- or 8-bit numbers, in the two layouts that
// quantised checkpoints are published in, read back into f32. Called once at start.
//
// W[o][i] = scale[g][o] * (q[i][o] - zero[g][o]), g the group of input i. For matrix NAME:
//   GPTQ (AutoGPTQ, GPTQModel): NAME.qweight I32 [in * bits / 32, out], numbers of one word are
//     neighbours in i, lowest bits first; NAME.qzeros I32 [groups, out * bits / 32], neighbours in o,
//     each less one (checkpoint_format gptq) or as it is (gptq_v2); NAME.scales [groups, out];
//     NAME.g_idx I32 [in], the group of each input (absent: i / group_size).
//   AWQ (AutoAWQ, "gemm", 4 bits): NAME.qweight I32 [in, out / 8], NAME.qzeros I32 [groups, out / 8],
//     the numbers of one word being outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on;
//     NAME.scales [groups, out].
// A NAME.bias must be all zeros, as Llama's is.
#ifndef LORAD_SERVER_MODEL_PACKED_WEIGHTS_H
#define LORAD_SERVER_MODEL_PACKED_WEIGHTS_H

#include "base/safetensors.h"
#include "server/model/config.h"

#include <stdbool.h>

// Whether the file holds `name` ("NAME.weight") packed instead of as it is.
bool packed_has(const struct safetensors *file, const char *name);
// Types and shapes of what belongs to it, before anything is read.
MUST_CHECK enum status packed_check(const struct safetensors *file, const struct packing *packing,
                                    const char *name, int out, int in, struct error *err);
// to [out, in].
MUST_CHECK enum status packed_read(const struct safetensors *file, const struct packing *packing,
                                   const char *name, int out, int in, float *to,
                                   struct error *err);
// Whether `tensor` is a part ("NAME.qweight" and so on) of matrix `name`.
bool packed_part(const char *tensor, const char *name);

#endif
