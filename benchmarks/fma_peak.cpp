// Measurement of a core's fused multiply-adds per nanosecond, with vectors of LANES floats: the upper limit for scan.py. With -DBF16:
// of pairs of bfloat16 with sums of 16 floats (AVX512_BF16), for block_bf16.py.
#if defined(BF16)
#include <immintrin.h>
#endif
#include <stdio.h>
#include <time.h>

typedef float vec __attribute__((vector_size(LANES * 4)));
constexpr int CHAINS = 12;  // number of independent chains, enough to hide the latency

#if defined(BF16)
constexpr int PRODUCTS = 2 * LANES;
inline vec multiply_add(vec sum, vec b, vec c) { return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)c); }
#else
constexpr int PRODUCTS = LANES;
inline vec multiply_add(vec sum, vec b, vec c) { return sum * b + c; }
#endif

int main() {
    vec a[CHAINS] = {}, b = a[0] + 0.999f, c = a[0] + 0.5f;
    double best = 0;
    for (int repeat = 0; repeat < 5; repeat++) {
        timespec start, end;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
        const long rounds = 10000000;
        for (long i = 0; i < rounds; i++)
#pragma GCC unroll 12
            for (int chain = 0; chain < CHAINS; chain++) a[chain] = multiply_add(a[chain], b, c);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        const double ns = (end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec);
        if (rounds * CHAINS * PRODUCTS / ns > best) best = rounds * CHAINS * PRODUCTS / ns;
    }
    for (int chain = 1; chain < CHAINS; chain++) a[0] += a[chain];
    printf("%.2f\n", best);
    return a[0][0] == 0;  // the results are used
}
