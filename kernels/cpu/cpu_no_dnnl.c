// What stands in for cpu_dnnl.c in a build without oneDNN (LORAD_STATIC): it cannot be asked for.
#ifdef LORAD_NO_DNNL
#include "kernels/cpu/cpu_internal.h"

#include "base/verify.h"

enum status cpu_dnnl_open(int threads, enum dtype dtype, struct dnnl_context **out,
                          struct error *err) {
    (void)threads, (void)dtype;
    *out = NULL;
    return error_set(err, STATUS_UNSUPPORTED, "this build has no oneDNN; LORAD_CPU_LINEAR=own");
}

void cpu_dnnl_close(struct dnnl_context *context) {
    VERIFY(!context);
}

enum status cpu_dnnl_linear_create(struct dnnl_context *context, const void *weights, int out,
                                   int in, struct dnnl_linear **result, struct error *err) {
    (void)context, (void)weights, (void)out, (void)in, (void)err;
    *result = NULL;
    VERIFY(false);
    return STATUS_UNSUPPORTED;
}

void cpu_dnnl_linear_destroy(struct dnnl_linear *linear) {
    VERIFY(!linear);
}

void cpu_dnnl_linear(const struct backend *b, const struct dnnl_linear *linear, float *y,
                     const void *x, int tokens) {
    (void)b, (void)linear, (void)y, (void)x, (void)tokens;
    VERIFY(false);
}
#endif
