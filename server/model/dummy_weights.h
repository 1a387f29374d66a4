// Weights from a seed (--load-format dummy), for measuring a shape without its model.
#ifndef LORAD_SERVER_MODEL_DUMMY_WEIGHTS_H
#define LORAD_SERVER_MODEL_DUMMY_WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

// bf16 uniform in +-0.02 sqrt(3): standard deviation 0.02. An element's number depends on the seed,
// its tensor's name and its index alone, on whatever number of threads. All cores work at it.
void dummy_weights(uint16_t *to, size_t count, uint64_t seed, const char *tensor);

#endif
